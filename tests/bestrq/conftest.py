"""Speech of twelve voices, and a pretraining on it."""

import numpy as np
import pytest
import soundfile

from tests.bestrq.runs import arguments_for, recipe_main, utterance


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """Twelve speakers with four utterances of two seconds each, in three formats."""
    folder = tmp_path_factory.mktemp("speech")
    rng = np.random.default_rng(0)
    for speaker in range(12):
        for number in range(4):
            ending = ("wav", "flac", "ogg")[number % 3]
            soundfile.write(folder / f"{speaker:02d}-{number}.{ending}", utterance(rng), 16000)
    return folder


@pytest.fixture(scope="module")
def trained(speech, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretraining")
    recipe_main()(arguments_for(speech, folder, max_steps=75))
    return folder
