"""Define the Flamingo model: vision encoder, perceiver resampler, and a language model with gated cross-attention.

Tensors carry their shape in their name: ``q_BLHK`` is [B, L, H, K]. Every file of this package uses these letters, and
no letter has a second meaning. Digits are sizes (``pixels_M3YX``); y and x are the pixels of one patch.

Text:
    B: rows of a batch.
    L: tokens of a row.
    T: tokens of all rows, one row after the other (B * L).
    N: target positions, which are the tokens whose next token has a label.
    A: added tokens (``<image>`` and ``<|endofchunk|>``).
    G: tokens of the longest prompt, in generation.
    Z: entries of the vocabulary.

Media:
    M: media of a batch.
    F: frames of a medium.
    I: images, which are the frames of all media.
    C: color channels.
    Y, X: rows and columns of pixels, or of patches.
    P: patches of all media, or of one grid, as stated.
    S: features of a frame, of a medium or of all media, as stated.
    R: latents of a medium.

Attention:
    H: heads.
    U: heads of keys and values, where several heads of queries share one.
    K: dim of a head (``head_dim``).
    Q: queries of an attention, padding included.
    J: keys of an attention, padding included.

Dims:
    D: hidden states of the language model.
    E: embeddings of the language model, which differ from D in some families.
    V: features of the vision tower.
    W: latents.
"""
