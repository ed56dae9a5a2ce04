"""Evaluate every query of the dashboard on a Prometheus that scrapes a server: `python3 check_dashboard.py URL`.

Exits with 1 if a query is refused or returns nothing. `test-image.sh` runs this; the tests import `queries`.
"""

import json
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DASHBOARD = Path(__file__).parent / "grafana" / "dashboards" / "lightwell.json"
TIMEOUT_SECONDS = 10


def load_dashboard() -> dict[str, Any]:
    dashboard: dict[str, Any] = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return dashboard


def queries(dashboard: dict[str, Any], variables: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Yield panel title and PromQL of each query, with Grafana's variables (`prefix`, `model_name` ...) substituted."""
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], _substitute(target["expr"], variables)


def _substitute(expression: str, variables: dict[str, str]) -> str:
    for name, value in variables.items():
        expression = expression.replace(f"${{{name}}}", value).replace(f"${name}", value)
    return expression


def evaluate(url: str, query: str) -> list[Any]:
    """Return the result of an instant query. Raises ValueError with Prometheus' message if it refuses the query."""
    address = f"{url}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT_SECONDS) as response:
            result: list[Any] = json.load(response)["data"]["result"]
            return result
    except urllib.error.HTTPError as error:
        raise ValueError(json.load(error)["error"]) from None


def _problem(url: str, query: str) -> str | None:
    try:
        return None if evaluate(url, query) else "returns nothing"
    except ValueError as error:
        return str(error)


def main(url: str) -> int:
    variables = {"prefix": "lightwell_", "model_name": ".*", "__rate_interval": "1m"}
    all_queries = list(queries(load_dashboard(), variables))
    problems = [(title, query, problem) for title, query in all_queries if (problem := _problem(url, query))]
    for title, query, problem in problems:
        print(f"{title}: {problem}: {query}", file=sys.stderr)
    print(f"{len(all_queries) - len(problems)} of {len(all_queries)} queries of the dashboard return data")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1].rstrip("/")))
