"""OpenTelemetry: a span for each generation request, sent to `--otlp-endpoint`."""
