"""Models of Hugging Face's hub, which `server.model_paths` and the command line load by name."""
