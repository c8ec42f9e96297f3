"""How rules weigh the patches of an encoder, and whether that localises objects."""

DEFAULT_RULES = ("attn-mn", "attn-lcte", "ca1", "dino", "pos")  # the paper's Table 6, and uniform weights
KL_FLOOR = 1e-8  # decision D26 of the reproduction: the paper's Fig. 7
