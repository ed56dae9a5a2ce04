"""What executions that show what happens inside have in common."""

from torch import Tensor

from engine.model.attention_weights import attention_weights
from engine.model.decoder import CausalLM
from engine.model.kv_cache import KVCache


class AttentionObserver:
    """Computes attention weights from queries and the KV cache."""

    model: CausalLM
    kv_cache: KVCache

    def attention_weights(self, layer: int, q: Tensor, block_ids: Tensor, first: int) -> Tensor:
        attention = self.model.layers[layer].self_attn
        keys = self.model.kernels.cached_keys(self.kv_cache.layers[layer], block_ids)[: first + len(q)]
        heads = q.view(len(q), attention.spec.num_heads, attention.spec.head_dim)
        return attention_weights(heads, keys, first, attention.scores, attention.spec.window)
