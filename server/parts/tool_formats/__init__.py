"""Tool calls that are not in JSON, and harmony, which `server.text.templates.syntaxes` loads by name."""
