"""The request router of the ingress, in Ray Serve's interface. Serve makes one for each handle of the deployment."""

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from server.parts.ray.messages import ForwardedRequest
from server.parts.ray.placement import ranked


class PrefixRouter(RequestRouter):
    """Routes a `ForwardedRequest` to the replica that it names, or by its opening and the load of the replicas."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return the replicas one by one, the preferred first. Serve takes the first that accepts the request."""
        if pending_request is None or not candidate_replicas:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # if none of them accepts it
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        cache = self.replica_queue_len_cache
        loads = {name: cache.get(replica.replica_id) or 0 for name, replica in replicas.items()}
        request: ForwardedRequest = pending_request.args[0]
        if request.replica in replicas:
            return [[replicas[request.replica]]]
        return [[replicas[name]] for name in ranked(request.opening, loads)]
