"""Tool calls that are no JSON objects, and harmony, which `server.text.templates.syntaxes` loads by name."""
