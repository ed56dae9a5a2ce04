"""One folder per API: routes, schemas, conversion (request to prompts) and writer (answers and streams)."""
