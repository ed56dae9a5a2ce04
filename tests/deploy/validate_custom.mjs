// Validate custom resources, a list as JSON on standard input, and print a line for each one that is invalid.
import { readFileSync } from "node:fs";

import { HTTPRoute } from "@kubernetes-models/gateway-api/gateway.networking.k8s.io/v1";
import { ScaledObject } from "@kubernetes-models/keda/keda.sh/v1alpha1";
import { PrometheusRule, ServiceMonitor } from "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1";

const MODELS = { HTTPRoute, PrometheusRule, ScaledObject, ServiceMonitor };

for (const manifest of JSON.parse(readFileSync(0, "utf-8"))) {
  try {
    new MODELS[manifest.kind](manifest).validate();
  } catch (error) {
    console.log(`${manifest.kind}: ${error.message}`);
  }
}
