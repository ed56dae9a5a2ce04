"""A Ray Serve application: replicas of the server on a cluster, behind an ingress that knows which has what cached."""
