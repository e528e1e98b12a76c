"""The attention function that transformers calls under mixedkv's name."""

from __future__ import annotations

from typing import Any

import torch

import mixedkv as mkv

from .masks import MaskPlan, plan_of
from .rows import handle_of

# What models and users pass through to every attention function and what has no bearing on a
# causal attention without packing. Anything else that is set is refused: it may mean something.
_WITHOUT_BEARING = frozenset(
    {
        "cache_position",
        "logits_to_keep",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "past_key_value",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend: transformers' attention interface.

    Parameters
    ----------
    module
        The model's attention layer; its `is_causal` counts where `is_causal` is None.
    query
        [batch, query heads, queries, head_dim].
    key, value
        Handles from a `MixedCache`, or tensors [batch, kv heads, keys, head_dim].
    attention_mask
        From `describe_mask`; without a MixedCache also a 4-D mask, boolean (True: attend) or
        additive.
    scaling, softcap, s_aux
        Scale of the logits, their soft cap, and a learned logit for each query head that takes
        part in the softmax and has no value.
    sliding_window
        Compared with the mask, which decides.

    Returns
    -------
    tuple
        Output [batch, queries, query heads, head_dim of V], contiguous, and None for the weights.
    """
    _refuse_unserved(query, key, value, dropout, kwargs)
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    plan = None if attention_mask is None else plan_of(attention_mask)
    if s_aux is not None:
        s_aux = s_aux.detach().float()
    soft_cap = float(softcap or 0.0)

    handle = handle_of(key)
    if handle is not None:
        if handle_of(value) is not handle:
            raise RuntimeError(
                "keys and values come from different calls of MixedCache.update: this model can't "
                "be served"
            )
        if attention_mask is not None and plan is None:
            raise NotImplementedError(
                "a MixedCache serves the masks that the model makes of a 2-D attention_mask, not "
                f"a ready-made one of shape {tuple(attention_mask.shape)}"
            )
        if not causal:
            raise NotImplementedError("a MixedCache serves causal attention, this layer is not")
        _check_window(sliding_window, plan, handle.step.first + handle.step.width)
        out = handle.cache.attend(
            handle,
            query,
            plan,
            for_layer=getattr(module, "layer_idx", None),
            sm_scale=scaling,
            logits_soft_cap=soft_cap,
            sinks=s_aux,
        )
        return out, None

    _check_window(sliding_window, plan, plan.columns if plan else key.shape[2])
    mask = None
    window_left = -1
    if plan is not None:
        if plan.causal and plan.aligned and plan.validity is None:
            causal = True
            window_left = -1 if plan.window is None else plan.window - 1
        else:
            causal, mask = False, plan.dense()
    elif attention_mask is not None:
        if attention_mask.ndim != 4:
            raise ValueError(
                f"an attention mask of shape {tuple(attention_mask.shape)} reached mixedkv: "
                "expected one of 4 dimensions, or the one that its mask function made"
            )
        causal, mask = False, attention_mask[..., : key.shape[2]]
        if mask.dtype not in (torch.bool, torch.float16, torch.float32):
            mask = mask.float()
    out = mkv.attention(
        query,
        key,
        value,
        sm_scale=scaling,
        causal=causal,
        mask=mask,
        window_left=window_left,
        logits_soft_cap=soft_cap,
        sinks=s_aux,
    )
    return out.transpose(1, 2).contiguous(), None


def _refuse_unserved(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    kwargs: dict[str, Any],
) -> None:
    if kwargs:
        for name, argument in kwargs.items():
            if name in _WITHOUT_BEARING or argument is None or argument is False:
                continue
            if name == "output_attentions":
                raise NotImplementedError(
                    "mixedkv makes no attention weights: output_attentions=True needs "
                    'attn_implementation="eager"'
                )
            raise NotImplementedError(
                f"mixedkv's attention does not know the argument {name!r} that the model gave it"
            )
    if dropout:
        raise NotImplementedError(
            f"mixedkv's attention has no dropout, got {dropout}: call model.eval()"
        )
    if torch.is_grad_enabled() and (
        query.requires_grad or key.requires_grad or value.requires_grad
    ):
        raise NotImplementedError(
            "mixedkv's attention has no backward: call the model under torch.no_grad()"
        )
    if query.device.type != "cpu":
        raise NotImplementedError(f"mixedkv computes on the CPU, got tensors on {query.device}")


def _check_window(told: int | None, plan: MaskPlan | None, columns: int) -> None:
    """Raise where the layer's own window and its mask's differ in what they hide."""
    if told is None or told <= 0:
        return
    window = plan.window if plan is not None else None
    known = plan is None or plan.causal
    if known and window != told and columns > min(told, window or told):
        raise NotImplementedError(
            f"the layer says that its window is {told} tokens, its mask says {window}"
        )
