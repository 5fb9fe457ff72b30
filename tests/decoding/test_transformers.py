"""What a GIT writes under all options is what transformers' `generate` writes, each row of a batch by itself."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close

from capvl.convert import git
from capvl.decoding.generate import Decoding, generate, n_best
from capvl.models.parameters import Blueprint

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]
START, EOS, VOCAB, LENGTH = 1, 2, 20, 18


@pytest.fixture(scope="module")
def pair():
    """A random GIT in both, images for both, and prompts of unequal length that repeat themselves."""
    vision = dict(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8
    )
    config = transformers.GitConfig(
        vision_config=vision, vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=LENGTH, bos_token_id=START, eos_token_id=EOS, pad_token_id=0,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.GitForCausalLM(config).eval()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for name, value in theirs.named_parameters():
            value.copy_(torch.tensor(rng.normal(size=value.shape) * (0.6 if "weight" in name else 0.3)))
        theirs.output.bias[0] = -1e9  # Padding, which is never written here.
        theirs.output.bias[EOS] += 5
    state = {name: value.numpy() for name, value in theirs.state_dict().items()}
    options, params = git.read_hugging_face(state, config.to_dict())
    blueprint, params = Blueprint(options), jax.device_put(params)
    image = rng.uniform(-1, 1, (6, 16, 16, 3)).astype(np.float32)
    pixels = np.asarray(blueprint.bind(params).encoder.normalize(jnp.asarray(image))).transpose(0, 3, 1, 2)
    prompts = [[], [5, 6, 5], [7], [8, 9, 8, 9], [4, 4], [3, 4, 5, 3]]
    return types.SimpleNamespace(
        theirs=theirs, blueprint=blueprint, params=params, image=jnp.asarray(image), pixels=torch.tensor(pixels),
        prompts=prompts, padded=jnp.asarray([p + [0] * (4 - len(p)) for p in prompts], jnp.int32),
    )  # fmt: skip


def ours(pair, decoding, write, length=LENGTH, **rest):
    @jax.jit
    def run(params, image, prompts):
        model = pair.blueprint.bind(params)
        kv = model.decoder.image_kv(model.encode(image))
        return write(model, kv, length, EOS, decoding, prompt_BP=prompts, **rest)

    return jax.device_get(run(pair.params, pair.image, pair.padded))


def expected(pair, row, **options):
    """transformers' answer for one row: its new ids, and the score."""
    ids = torch.tensor([[START, *pair.prompts[row]]])
    with torch.no_grad():
        found = pair.theirs.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=pair.pixels[row : row + 1],
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )
    rows = found.sequences[:, ids.shape[1] :].tolist()
    # Behind an end stand 0 or further ends.
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in rows], getattr(found, "sequences_scores", None)


OPTIONS = [
    (dict(max_tokens=4), dict(max_new_tokens=4)),
    (dict(max_tokens=9, min_tokens=6), dict(max_new_tokens=9, min_new_tokens=6)),
    (dict(max_tokens=12, no_repeat_ngram=1), dict(max_new_tokens=12, no_repeat_ngram_size=1)),
    (dict(max_tokens=12, no_repeat_ngram=2), dict(max_new_tokens=12, no_repeat_ngram_size=2)),
    (
        dict(max_tokens=12, min_tokens=8, no_repeat_ngram=3),
        dict(max_new_tokens=12, min_new_tokens=8, no_repeat_ngram_size=3),
    ),
]


@pytest.mark.parametrize("options, theirs", OPTIONS, ids=str)
def test_greedy_and_beams(pair, options, theirs):
    tokens, _ = ours(pair, Decoding(**options), generate)
    sampled, _ = ours(pair, Decoding(temperature=0.7, top_k=1, **options), generate, key=jax.random.key(0))
    np.testing.assert_array_equal(sampled, tokens)  # Sampling from the likeliest only is greedy.
    found = ours(pair, Decoding(beams=3, length_penalty=0.6, **options), n_best)
    lengths, plain = set(), ours(pair, Decoding(max_tokens=12, beams=3, length_penalty=0.6), n_best)
    for row in range(len(pair.prompts)):
        (greedy,), _ = expected(pair, row, do_sample=False, **theirs)
        assert [t for t in tokens[row].tolist() if t] == greedy, row
        beams, scores = expected(
            pair, row, num_beams=3, num_return_sequences=3, length_penalty=0.6, do_sample=False, **theirs
        )
        assert [[t for t in text if t] for text in found.tokens[row].tolist()] == beams, row
        assert_close(found.scores[row], scores.numpy(), 1e-4)
        lengths |= {len(greedy), *map(len, beams)}
    assert len(lengths) > 1 and (found.tokens != plain.tokens).any()


def test_samples_are_drawn_as_transformers_draws_them(pair):
    """The first token's frequencies are those of the logits that transformers keeps."""
    options = dict(temperature=1.5, top_p=0.8)
    found, _ = ours(pair, Decoding(max_tokens=2, min_tokens=1, no_repeat_ngram=2, **options), generate,
                    key=jax.random.key(1), samples=3000)  # fmt: skip
    for row in range(len(pair.prompts)):
        ids = torch.tensor([[START, *pair.prompts[row]]])
        with torch.no_grad():
            first = pair.theirs.generate(
                input_ids=ids, pixel_values=pair.pixels[row : row + 1], do_sample=True, top_k=0, max_new_tokens=2,
                min_new_tokens=1, no_repeat_ngram_size=2, return_dict_in_generate=True, output_scores=True, **options,
            ).scores[0][0]  # fmt: skip
        wanted = torch.softmax(first, dim=0).numpy()
        share = np.bincount(found[3000 * row : 3000 * (row + 1), 0], minlength=VOCAB) / 3000
        assert (share[wanted == 0] == 0).all()
        np.testing.assert_allclose(share, wanted, atol=0.05)
