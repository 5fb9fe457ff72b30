"""Matmul FLOPs on paper.

A multiply-add counts as two. Only matmuls count; softmax, norms and activations don't.
"""

from capvl.models import sizes


def _layer(tokens: int, width: int, mlp: int) -> float:
    """Self-attention and MLP of one layer, forward."""
    projections = 4 * 2 * tokens * width * width
    scores = 2 * 2 * tokens * tokens * width
    return projections + scores + 2 * 2 * tokens * width * mlp


def _kept(options) -> int:
    """Patches that the encoder's blocks see in training."""
    patches = (options.res // sizes.parse(options.encoder)[1]) ** 2
    return max(1, round(patches * (1 - options.patch_dropout)))


def _stem(options) -> float:
    """Patch embedding of one image."""
    size, patch = sizes.parse(options.encoder)
    patches = (options.res // patch) ** 2
    if options.stem == "patch":
        return 2 * patches * patch * patch * 3 * size.width
    total, side, channels = 2 * patches * size.width * size.width, options.res, 3
    for stride, out in sizes.stem(patch, size.width):
        side //= stride
        total, channels = total + 2 * side * side * 9 * channels * out, out
    return total


def encoder(options) -> float:
    """Forward matmul FLOPs of one image (`capvl.models.vit.ViTOptions`), without a MAP head."""
    size, _ = sizes.parse(options.encoder)
    tokens = _kept(options) + options.registers + (options.pool == "cls")
    return _stem(options) + size.depth * _layer(tokens, size.width, size.mlp)


def map_head(options) -> float:
    """Forward matmul FLOPs of pooling one image by a MAP head."""
    size, _ = sizes.parse(options.encoder)
    tokens, width = _kept(options), size.width
    return 2 * 2 * tokens * width * width + 2 * 2 * width * width + 2 * 2 * tokens * width + 2 * 2 * width * size.mlp


def decoder(options) -> float:
    """Forward matmul FLOPs of the captioner's decoder and output layer over one text."""
    size, _ = sizes.parse(options.encoder)
    width, length = size.width, options.length
    seen = _kept(options) + (options.pool == "cls")
    cross = 2 * 2 * length * width * width + 2 * 2 * seen * width * width + 2 * 2 * length * seen * width
    return options.decoder_layers * (_layer(length, width, size.mlp) + cross) + 2 * length * width * options.vocab


def git_decoder(options, texts: int = 1) -> float:
    """Forward matmul FLOPs of GIT's decoder over one image (or clip) and its texts (`capvl.models.git.GitOptions`)."""
    size, visual = sizes.parse_size(options.text), sizes.parse(options.encoder)[0].width
    width, length = size.width, options.length
    seen = _kept(options) + (options.pool == "cls")
    if options.max_side:
        patch = sizes.parse(options.encoder)[1]
        seen = (options.res // patch) * (options.max_side // patch) + (options.pool == "cls")
    if options.frames and options.frame_pool == "concat":
        seen *= options.frames
    looks = 2 * 2 * length * seen * width
    if options.fusion == "prefix":
        # The last layer gives keys and values of the image only.
        image = (size.depth - 1) * _layer(seen, width, size.mlp) + 2 * 2 * seen * width * width
    else:
        image = size.depth * 2 * 2 * seen * width * width
        looks += 2 * 2 * length * width * width
    text = size.depth * (_layer(length, width, size.mlp) + looks) + 2 * length * width * options.vocab
    return 2 * seen * visual * width + image + texts * text


def captioner(options) -> float:
    """Forward matmul FLOPs of one image and its text (`capvl.models.captioner.CaptionerOptions`)."""
    return encoder(options) + decoder(options)


def text_tower(options) -> float:
    """Forward matmul FLOPs of one text (`capvl.models.two_towers.TwoTowersOptions`)."""
    size = sizes.parse_size(options.text)
    joint = options.projection or sizes.parse(options.encoder)[0].width
    return size.depth * _layer(options.length, size.width, size.mlp) + 2 * size.width * joint


def image_keys(options) -> float:
    """Matmul FLOPs of projecting one image's tokens to the decoder's keys and values."""
    size, _ = sizes.parse(options.encoder)
    seen = _kept(options) + (options.pool == "cls")
    return options.decoder_layers * 2 * 2 * seen * size.width * size.width


def decoder_tree(options, nodes: int, edges: int) -> float:
    """Matmul FLOPs of scoring a tree of tokens (`capvl.decoding.trie`) for one image whose keys are there."""
    size, _ = sizes.parse(options.encoder)
    width = size.width
    seen = _kept(options) + (options.pool == "cls")
    cross = 2 * 2 * nodes * width * width + 2 * 2 * nodes * seen * width
    layers = options.decoder_layers * (_layer(nodes, width, size.mlp) + cross)
    return layers + 2 * nodes * width * options.vocab + 2 * edges * width
