"""Read the server's Prometheus metrics twice, a second apart, and print how busy it is.

    python examples/metrics.py

Prometheus does the same every 15 seconds with the configuration in deploy/prometheus/prometheus.yml.
"""

import os
import time

import httpx
from prometheus_client.parser import text_string_to_metric_families

BASE_URL = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")
HEADERS = {"Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', 'none')}"}


def scrape() -> dict[str, float]:
    """Return the value of each sample, summed over labels."""
    page = httpx.get(f"{BASE_URL.removesuffix('/v1')}/metrics", headers=HEADERS).raise_for_status().text
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            values[sample.name] = values.get(sample.name, 0.0) + sample.value
    return values


before = scrape()
time.sleep(1)
after = scrape()
print(f"running:  {after['lightwell_num_requests_running']:.0f} requests")
print(f"waiting:  {after['lightwell_num_requests_waiting']:.0f} requests")
print(f"KV cache: {after['lightwell_kv_cache_usage_perc']:.0%} in use")
for name in ("prompt", "generation"):
    metric = f"lightwell_{name}_tokens_total"
    print(f"{name} tokens: {after[metric] - before[metric]:.0f} a second, {after[metric]:.0f} in all")
