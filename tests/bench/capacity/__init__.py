"""What replicas can serve: a simulation of the engine's scheduler, and the measurements that it needs."""
