"""Several models, and those that are not kept in memory: `server.main` loads the manager by name."""
