"""One example of the scenes data set as plain values; light enough for worker processes."""

from capvl.data.scenes import language, render, world

FACTS = ("phrase", "shape", "color", "size", "texture", "word")


def make(seed: int, split: str, side: int, frames: int, index: int, **options) -> dict:
    """Example `index` of a split: an image, or a clip where `frames` is not 0. Boxes are (x0, y0, x1, y1).

    `options` are those of `world.draw_scene`.
    """
    rng = world.generator(seed, split, index)
    if frames:
        clip = world.draw_clip(rng, frames, **options)
        scene = clip.scene
        example = {
            "frames": [render.encode_jpeg(render.render(clip.frame(i), side)) for i in range(frames)],
            "text": language.clip_captions(clip),
            "questions": language.clip_questions(clip),
            "direction": clip.direction,
        }
    else:
        scene = world.draw_scene(rng, **options)
        example = {
            "image": render.encode_jpeg(render.render(scene, side)),
            "text": language.captions(scene, rng),
            "questions": language.questions(scene, rng),
        }
    shaped = [t.shape for t in scene.things if not t.word]
    example["objects"] = [
        {"bbox": tuple(map(float, t.box))} | {name: getattr(t, name) for name in FACTS} for t in scene.things
    ]
    return example | {"label": shaped[0] if shaped else "word", "index": index}
