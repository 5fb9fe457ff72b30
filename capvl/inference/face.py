"""A trained model for notebooks and programs: images and texts in, arrays and texts out.

    model = capvl.load("runs/cappa_demo")
    model.caption("photo.jpg", beams=4)

Functions are compiled once for each power of two of rows (`capvl.inference.compiled`).
"""

from capvl.inference import classifying, finding, judging, matching, retrieving, scoring, writing
from capvl.inference.loaded import Loaded


class LoadedModel(Loaded):
    """A model with its parameters. Methods raise UserError where the model lacks the part that they need.

    Attributes:
      options: of the model.
      params: by path.
    """

    embed = matching.embed
    embed_text = matching.embed_text
    tokens = matching.tokens
    similarity = matching.similarity
    match = matching.match
    retrieve = retrieving.retrieve
    ground = finding.ground
    detect = finding.detect

    score = scoring.score
    classify = classifying.classify
    judge = judging.judge

    caption = writing.caption
    answer = writing.answer
    read = writing.read
    caption_video = writing.caption_video
    answer_video = writing.answer_video
    n_best = writing.n_best
