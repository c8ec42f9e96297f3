"""How rules weigh the patches of an encoder, and whether that localises objects."""

DEFAULT_RULES = ("attn-mn", "attn-lcte", "ca1", "dino", "pos")  # the paper's Table 6, and uniform weights
