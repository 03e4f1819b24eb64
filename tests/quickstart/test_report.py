"""What the page of quickstart says of the two models; tests/architecture/test_readme.py has the whole page written."""

import math
from pathlib import Path

from moesaic.evaluate.perplexity import Perplexity
from moesaic.quickstart.life import quickstart_config
from moesaic.quickstart.report import Stage, describe_student


def test_what_is_kept_is_of_the_perplexity(tmp_path: Path) -> None:
    config = quickstart_config(tmp_path)

    def stage(perplexity: float) -> Stage:
        found = Perplexity(math.log(perplexity), 1000, 3000, 5, 256, 128)
        return Stage(tmp_path, config, 1.0, 1.0, found, ())

    text = describe_student(stage(80.0), stage(100.0))
    assert text == (
        "The student has 0% fewer parameters, and a perplexity of 100.00 on unseen text where the teacher has 80.00 "
        "(80.0 % kept)."
    )
