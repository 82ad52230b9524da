"""Show where the model looks: the attention of each generated token over media and over their patches.

The cross-attention says how much a token attends to each latent, averaged over heads and layers. Attention rollout
(Abnar and Zuidema 2020) says how much each latent of the resampler comes from each patch: every layer passes on half
of its input and half of what it attends to. Their product is a map over the patches. Weights are computed again in
plain torch from the model's own projections; the fused ops keep none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from model.flamingo import Flamingo
from model.gated_cross_attention import GatedCrossAttentionBlock, MaskedCrossAttention
from model.language_model import Call
from model.media_index import preceding
from model.perceiver_resampler import (
    LinearProjector,
    PerceiverAttention,
    PerceiverLayer,
    PerceiverResampler,
    TransformerResampler,
)
from model.seen_media import SeenMedia
from model.tower_patches import Grid, PatchLayout


@dataclass(frozen=True)
class AttentionMaps:
    """Hold the attention of T generated tokens; a token without media has zeros everywhere.

    Attributes:
        media: float32 [T, M], share of each medium; a row sums to 1.
        patches: For each medium float32 [T, Y, X], share of each patch in rows and columns. All maps of a token sum to
            1. Frames of a video are summed.
    """

    media: Tensor
    patches: tuple[Tensor, ...]


@torch.no_grad()
def attention_maps(
    model: Flamingo,
    prompt: Sequence[int],
    generated: Sequence[int],
    media: Tensor,
    media_grids: Sequence[Grid] | None = None,
) -> AttentionMaps:
    """Return where the model looked when it chose each generated token.

    Args:
        model: Model in evaluation mode, whole on its device.
        prompt: Token ids of the prompt.
        generated: Token ids that follow it.
        media: Media of the prompt, as for ``Flamingo.encode_media``.
        media_grids: As for ``Flamingo.encode_media``.

    Raises:
        ValueError: Media and ``<image>`` tokens differ in number, or the tower's features have no place in the image.
    """
    ids = torch.tensor([[*prompt, *generated]], device=model.device)
    media = media.to(model.device)
    number = len(media) if media_grids is None else len(media_grids)
    if int((ids == model.tokens.image_id).sum()) != number:
        raise ValueError(f"{number} media, but the prompt has {prompt.count(model.tokens.image_id)} <image> tokens")
    if not prompt or not number:
        raise ValueError("attention maps need a prompt with media")
    layout = None if media_grids is None else PatchLayout.of(media_grids).to(media.device)
    blocks = model.media_blocks(media, media_grids, layout)
    if model.vision_encoder.max_tiles is not None or model.config.cross_attention.without_media == "all_media":
        raise ValueError("attention maps of a tower of tiles: its features have no single place in the image")
    seen = model.find_seen_media(ids, preceding(ids, model.tokens.image_id), None, blocks)
    latents = model.encode_media(media, media_grids, layout)
    chosen = slice(len(prompt) - 1, ids.shape[1] - 1)  # a token is chosen where the one before it is read
    latents_TMR = _cross_attention(model, ids, seen, latents)[chosen]
    grids = media_grids or [_square(model, media.shape[1])] * number
    if isinstance(model.resampler, LinearProjector):
        offsets = list(range(number + 1)) if blocks is None else blocks.cu_blocks.tolist()
        # A latent is a feature, and a medium a run of blocks.
        maps_TS = [latents_TMR[:, a:b].flatten(1) for a, b in pairwise(offsets)]
    else:
        shares = _rollout(model, media, media_grids, layout)
        maps_TS = [latents_TMR[:, medium] @ share_RS for medium, share_RS in enumerate(shares)]
    maps = tuple(_place(one_TS, grid) for one_TS, grid in zip(maps_TS, grids, strict=True))
    total_T = torch.stack([one.sum((1, 2)) for one in maps]).sum(0)
    # Features of a class token have no place; the rest of the map is scaled up.
    share_T = torch.where(total_T > 0, 1 / total_T.clamp(min=torch.finfo(torch.float32).tiny), 0.0)
    maps = tuple(one * share_T[:, None, None] for one in maps)
    return AttentionMaps(torch.stack([one.sum((1, 2)) for one in maps], 1), maps)


def _square(model: Flamingo, num_frames: int) -> Grid:
    """Return the frames, rows and columns of a square's features, apart from a class token's."""
    number = model.vision_encoder.num_features
    for places in (number, number - 1):
        side = math.isqrt(places)
        if side * side == places:
            return num_frames, side, side
    raise ValueError(f"attention maps: the tower has {number} features of an image, which are no square")


def _place(map_TS: Tensor, grid: Grid) -> Tensor:
    """Return a map [T, Y, X] from shares of all features of a medium; frames are summed."""
    frames, rows, columns = grid
    each = map_TS.unflatten(1, (frames, -1))
    return each[..., each.shape[-1] - rows * columns :].sum(1).unflatten(-1, (rows, columns)).cpu()


def _cross_attention(model: Flamingo, ids: Tensor, seen: SeenMedia, latents_MRW: Tensor) -> Tensor:
    """Return the weights of all tokens over all latents, float32 [L, M, R], averaged over heads and layers."""
    found: list[Tensor] = []

    def before(block: GatedCrossAttentionBlock, hidden_BLD: Tensor) -> Tensor:
        found.append(cross_attention_weights(block.attention, hidden_BLD[0], latents_MRW, seen))
        out: Tensor = block(hidden_BLD, latents_MRW, seen.last, seen.first, has_media_BL=seen.has_media)
        return out

    blocks = model.blocks_with_cross_attention()
    model.language_model(ids, call=Call({index: partial(before, block) for index, block in blocks.items()}))
    return torch.stack(found).mean(0)


def cross_attention_weights(
    attention: MaskedCrossAttention, hidden_LD: Tensor, latents_MRW: Tensor, seen: SeenMedia
) -> Tensor:
    """Return the weights of the tokens of one row over all latents, float32 [L, M, R], averaged over heads.

    Args:
        attention: Cross-attention.
        hidden_LD: Its input.
        latents_MRW: Latents of all media, in the type of its weights.
        seen: Latents that each token sees.
    """
    dtype = attention.query.weight.dtype
    q_LHK = attention.query(attention.norm(hidden_LD.to(dtype))).unflatten(-1, (attention.num_heads, -1))
    k_MRHK, _ = attention.project_media(latents_MRW)
    k_MRHK = k_MRHK.repeat_interleave(attention.num_heads // attention.num_kv_heads, 2)
    q_LHK = attention.query_norm(q_LHK).float()
    scores_HLMR = torch.einsum("lhk,mrhk->hlmr", q_LHK, k_MRHK.float()) * attention.head_dim**-0.5
    last_L = seen.last[0]
    first_L = last_L if seen.first is None else seen.first[0]
    medium_M = torch.arange(len(latents_MRW), device=last_L.device)
    sees_LM = (medium_M >= first_L[:, None]) & (medium_M <= last_L[:, None]) & (last_L >= 0)[:, None]
    weights = scores_HLMR.masked_fill(~sees_LM[..., None], -torch.inf).flatten(2).softmax(-1)
    return weights.nan_to_num(0.0).mean(0).view(scores_HLMR.shape[1:])  # a token without media has nan


def _rollout(
    model: Flamingo, media: Tensor, media_grids: Sequence[Grid] | None, layout: PatchLayout | None
) -> list[Tensor]:
    """Return for each medium how much each latent comes from each feature, float32 [R, S]; rows sum to 1."""
    resampler = model.resampler
    assert isinstance(resampler, PerceiverResampler)
    features = model.vision_encoder(media, media_grids, layout)
    if layout is None:
        each_SW = list(resampler.project_frames(features).flatten(1, 2))
    else:
        each = model.vision_encoder.features_per_patch
        frames = layout.frame_of_patch.repeat_interleave(each)
        projected_SW = resampler.project(features)
        if resampler.time_embeddings is not None:
            projected_SW = projected_SW + resampler.time_embeddings[frames]
        each_SW = list(projected_SW.split((layout.cu_media.diff() * each).tolist()))
    roll = _roll_transformer if isinstance(resampler, TransformerResampler) else _roll_perceiver
    return [roll(resampler, features_SW) for features_SW in each_SW]


def _roll_perceiver(resampler: PerceiverResampler, features_SW: Tensor) -> Tensor:
    size = len(features_SW)
    latents_MRW = resampler.latents[None].to(features_SW.dtype)
    share_RS = torch.zeros(latents_MRW.shape[1], size, device=features_SW.device)
    cu_media = torch.tensor([0, size], device=features_SW.device)
    for layer in resampler.layers:
        assert isinstance(layer, PerceiverLayer)
        weights_RS, weights_RR = perceiver_weights(layer.attention, features_SW, latents_MRW[0])
        share_RS = 0.5 * share_RS + 0.5 * (weights_RS + weights_RR @ share_RS)
        latents_MRW = layer(features_SW, latents_MRW, cu_media)
    return share_RS / share_RS.sum(-1, keepdim=True)


def _roll_transformer(resampler: PerceiverResampler, features_SW: Tensor) -> Tensor:
    number, size = len(resampler.latents), len(features_SW)
    x_QW = torch.cat([resampler.latents.to(features_SW.dtype), features_SW])
    share_QS = torch.cat([torch.zeros(number, size, device=x_QW.device), torch.eye(size, device=x_QW.device)])
    nothing, cu_nothing = features_SW[:0], torch.zeros(2, dtype=torch.int64, device=x_QW.device)
    for layer in resampler.layers:
        assert isinstance(layer, PerceiverLayer)
        _, weights_QQ = perceiver_weights(layer.attention, nothing, x_QW)
        share_QS = 0.5 * share_QS + 0.5 * weights_QQ @ share_QS
        x_QW = layer(nothing, x_QW[None], cu_nothing)[0]
    return share_QS[:number] / share_QS[:number].sum(-1, keepdim=True)


def perceiver_weights(attention: PerceiverAttention, features_SW: Tensor, latents_RW: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weights of the latents over features and latents, float32 [R, S] and [R, R], averaged over heads.

    Args:
        attention: Attention of a layer of the resampler.
        features_SW: Features of one medium.
        latents_RW: Latents of the medium.
    """
    normed_RW = attention.norm_latents(latents_RW)
    keys_JW = torch.cat([attention.norm_features(features_SW), normed_RW])
    q_RHK = attention.query_norm(attention.query(normed_RW).unflatten(-1, (attention.num_heads, -1)))
    k_JHK = attention.key_norm(attention.key_value(keys_JW).unflatten(-1, (2, attention.num_heads, -1))[:, 0])
    scores = torch.einsum("rhk,jhk->hrj", q_RHK.float(), k_JHK.float()) * attention.head_dim**-0.5
    weights_RJ = scores.softmax(-1).mean(0)
    return weights_RJ[:, : len(features_SW)], weights_RJ[:, len(features_SW) :]
