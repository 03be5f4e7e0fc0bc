"""Model cards of encoders that were pretrained here."""

import json
import shutil

import publish
import pytest
import speech_prepare

from hff_modules.encoder import SSLEncoder
from tests.bestrq.runs import LICENCES


def test_a_published_encoder_names_the_licences_of_its_data(speech, trained, tmp_path):
    rounds, root, folder = [trained / "run" / "encoder"], speech.parent, tmp_path / "mine"
    with pytest.raises(ValueError, match=f"sets begins {speech.name}"):
        publish.publish(folder, rounds, root, json.loads(LICENCES.read_text()), "a core")
    with pytest.raises(ValueError, match="data_root: .* is not in"):
        publish.publish(folder, rounds, tmp_path, {}, "a core")
    assert not folder.exists()

    sets = [[speech.name, "Tones", "MIT"], [speech.name[:2], "Others", "CC0"]]
    own = {"licence": "mit", "sets": sets, "remarks": "None of it is speech."}
    publish.publish(folder, rounds, root, own, "a core")
    card = (folder / "README.md").read_text()
    assert f"| Tones: {speech.name} | MIT |" in card and "license: mit\n" in card
    assert card.endswith("\nNone of it is speech.\n") and "CC" not in card and "EmoDB" not in card
    assert str(root) not in (folder / "training.json").read_text() + card
    assert "hours were held out, by speaker, for the curves." in card
    assert (folder / "curves.png").stat().st_size > 0
    assert SSLEncoder(str(folder), layers=2).hidden_size == 48


def test_a_card_names_all_that_its_rounds_heard_and_claims_nothing_else(trained, tmp_path):
    def trained_on(name, init, **changes):
        folder = shutil.copytree(trained / "run" / "encoder", tmp_path / name)
        report = json.loads((folder / "training.json").read_text())
        report["config"] |= {"sources": [f"/data/{name}"], "init": init, "objective": "best_rq"}
        report["targets"] |= {"objective": "best_rq"}
        report["targets"]["learned_from"] = speech_prepare.learned_from(report["config"])
        report["data"] |= changes
        (folder / "training.json").write_text(json.dumps(report))
        return str(folder)

    first = trained_on("private", None, held_out="recordings")
    second = trained_on("open", first)
    other = trained_on("far", "maker/model", held_out=None)
    own = {"licence": "mit", "remarks": "", "sets": [["open", "Open", "MIT"]]}
    for rounds in ([second], [first, second]):  # the first one counts even if nobody names it
        with pytest.raises(ValueError, match="none of the sets begins private"):
            publish.publish(tmp_path / "card", rounds, "/data", own, "a core")
    own["sets"].append(["private", "Mine", "all rights reserved"])
    publish.publish(tmp_path / "card", [first, second], "/data", own, "a core")
    card = (tmp_path / "card" / "README.md").read_text()
    assert "| Mine: private | all rights reserved |" in card and "| Open: open | MIT |" in card
    assert "| 1 | fresh weights |" in card and "| 2 | round 1 |" in card
    assert "round 1: " in card and "held out, single recordings, for the curves" in card
    assert "cluster" not in card and str(tmp_path) not in card
    text = (tmp_path / "card" / "training.json").read_text()
    assert json.loads(text)["learned_from"] == ["private", "open"] and str(tmp_path) not in text

    # A round that goes on from a published encoder: its rounds come first, what it heard counts.
    third = trained_on("third", str(tmp_path / "card"))
    own["sets"].append(["third", "Third", "MIT"])
    publish.publish(tmp_path / "card", [tmp_path / "card", third], "/data", own, "a core")
    card = (tmp_path / "card" / "README.md").read_text()
    assert "| 2 | round 1 |" in card and "| 3 | round 2 |" in card and "rounds: 3" in card
    assert all(f": {name} |" in card for name in ("private", "open", "third"))
    assert len(json.loads((tmp_path / "card/training.json").read_text())["rounds"]) == 3

    own["sets"].append(["far", "Far", "MIT"])
    with pytest.raises(ValueError, match="maker/model is not in /data, and no set"):
        publish.publish(tmp_path / "card", [other], "/data", own, "a core")
    own["sets"].append(["maker/model", "A model", "Apache 2.0"])
    publish.publish(tmp_path / "card", [first, other], "/data", own, "a core")
    card = (tmp_path / "card" / "README.md").read_text()
    assert "| A model: maker/model | Apache" in card and "| Mine: private |" in card
    publish.publish(tmp_path / "on", [tmp_path / "card", third], "/data", own, "a core")
    assert "| A model: maker/model | Apache" in (tmp_path / "on" / "README.md").read_text()
    assert "| 2 | another encoder |" in card and "hours were held out for the curves" in card
