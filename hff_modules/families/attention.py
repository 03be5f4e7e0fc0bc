"""Attention with hooks on its keys and values, through the interface that Transformers offers."""

from collections.abc import Callable

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

HOOKED = "hooked_sdpa"  # the name under which Transformers knows it
_HOOKS = "key_value_hooks"


def has_hooks(attention: nn.Module) -> bool:
    """Whether anything changes the keys and values of this attention."""
    return bool(getattr(attention, _HOOKS, None))


class KeyValueHook:
    """A change of the keys and values of one attention, until it is removed."""

    def __init__(self, family, attention: nn.Module, change: Callable):
        self.family, self.attention, self.change = family, attention, change
        setattr(attention, _HOOKS, [*getattr(attention, _HOOKS, []), self])
        family.route_attention()

    def remove(self) -> None:
        """Take the change off."""
        hooks = getattr(self.attention, _HOOKS)
        hooks.remove(self)
        if not hooks:
            delattr(self.attention, _HOOKS)
        self.family.route_attention()


def _hooked_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_bias: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Hugging Face's "sdpa" attention behind the hooks on the module's keys and values."""
    if getattr(module, "gives_relative_keys", False):
        position_bias = relative_key_bias(module, query, key)
    for hook in getattr(module, _HOOKS, ()):
        key, value, attention_mask, position_bias = hook.change(
            key, value, attention_mask, position_bias
        )
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, position_bias=position_bias, **kwargs
    )


def give_relative_keys(attention: nn.Module) -> None:
    """Compute w2v-BERT's "relative_key" position bias here, and not in Hugging Face's way.

    That one embeds every pair of frames, (frames, frames, head width), and multiplies all of it
    with the queries. Here queries meet every distance once, and pairs are looked up in the result.
    """
    attention.gives_relative_keys = True
    attention.position_embeddings_type = None


def relative_key_bias(module: nn.Module, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Position scores of w2v-BERT's "relative_key" attention, at the cost of one small product.

    Arguments
    ---------
    module : Wav2Vec2BertSelfAttention
    query, key : torch.Tensor
        (batch, heads, frames, head width)

    Returns
    -------
    torch.Tensor
        (batch, heads, queries, keys)
    """
    left, right = module.left_max_position_embeddings, module.right_max_position_embeddings
    queries = torch.arange(query.shape[2], device=query.device)
    keys = torch.arange(key.shape[2], device=query.device)
    distance = (keys - queries.unsqueeze(1)).clamp(-left, right) + left
    by_distance = query @ (module.scaling * module.distance_embedding.weight.T.to(query.dtype))
    return by_distance.gather(-1, distance.expand(*query.shape[:2], -1, -1))


AttentionInterface.register(HOOKED, _hooked_attention)
AttentionMaskInterface.register(HOOKED, sdpa_mask)


def wavlm_attention(
    attention: nn.Module,
    hidden: torch.Tensor,
    frame_mask: torch.Tensor | None,
    position_bias: torch.Tensor,
) -> tuple[torch.Tensor, None]:
    """WavLM's attention with its projections called as modules, which makes them adaptable.

    Hugging Face hands the raw weights to one fused call, past any LoRA, and has it return the
    weights of all heads, which nothing here needs.
    """
    batch, frames, _ = hidden.shape
    heads = (batch, frames, attention.num_heads, attention.head_dim)
    query = attention.q_proj(hidden).view(heads).transpose(1, 2)
    key = attention.k_proj(hidden).view(heads).transpose(1, 2)
    value = attention.v_proj(hidden).view(heads).transpose(1, 2)
    bias = position_bias.view(batch, attention.num_heads, frames, frames).to(query.dtype)
    mask = None if frame_mask is None else frame_mask.bool()[:, None, None, :]
    for hook in getattr(attention, _HOOKS, ()):
        key, value, mask, bias = hook.change(key, value, mask, bias)
    if mask is not None:
        bias = bias.masked_fill(~mask, float("-inf"))
    dropout = attention.dropout if attention.training else 0.0
    attended = nn.functional.scaled_dot_product_attention(query, key, value, bias, dropout)
    return attention.out_proj(attended.transpose(1, 2).reshape(hidden.shape)), None
