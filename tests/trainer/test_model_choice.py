"""The model and the weights of a command: those given, or those of the adapters in its folder."""

import dataclasses
import subprocess
import sys

import open_clip
import pytest

from clipweld.trainer.adapters.adapter import save_adapter
from clipweld.trainer.base.model_choice import choose_model, choose_weights
from clipweld.trainer.base.model_names import find_model
from clipweld.trainer.cli import main
from clipweld.trainer.errors import UnknownModel, WrongBase


@pytest.fixture
def write(fitted, tmp_path):
    """A function that writes an adapter with changed metadata and returns its folder."""

    def write(task="digits", **changes):
        save_adapter(dataclasses.replace(fitted.adapter, task=task, **changes), tmp_path / f"{task}.safetensors")
        return tmp_path

    return write


def test_every_model_of_open_clip_is_known_without_importing_it():
    assert [find_model(name) for name in open_clip.list_models()] == open_clip.list_models()
    code = (
        "import sys; from clipweld.trainer.base.model_names import find_model; find_model('vit-b-16')\n"
        "print('torch' in sys.modules, 'open_clip' in sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.split() == ["False", "False"]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("vit-b-16", "ViT-B-16"),
        ("ViT-B/16", "ViT-B-16"),
        ("ViT_B_16 ", "ViT-B-16"),
        ("VITB32", "ViT-B-32"),
        ("ViT-L/14@336px", "ViT-L-14-336"),
        ("vit-b-16-quickgelu", "ViT-B-16-quickgelu"),
        ("Mini", "mini"),
    ],
)
def test_model_names_are_understood_in_any_case_and_with_any_separators(written, meant):
    assert find_model(written) == meant


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("ViT-B-17", "near names: ViT-B-16"),
        ("hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "--model ViT-B-32 --pretrained laion2b_s34b_b79k"),
        ("laion/CLIP-ViT-L-14-laion2B-s32B-b82K", "--model ViT-L-14 --pretrained laion2b_s32b_b82k"),
        ("openai/clip-vit-base-patch16", "--model ViT-B-16 --pretrained openai"),
        ("openai/clip-vit-large-patch14-336", "--model ViT-L-14-336 --pretrained openai"),
        ("ViT-B-32:laion2b_s34b_b79k", "--model ViT-B-32 --pretrained laion2b_s34b_b79k"),
        ("laion2b_s34b_b79k", "a tag of weights, for --pretrained, beside a --model such as ViT-B-32"),
        ("some/where.safetensors", "a file of weights goes to --pretrained some/where.safetensors"),
        ("trainer/src/clipweld/trainer/mini/mini.json", "a file of weights goes to --pretrained"),
        ("hf-hub:someone/something", "--model NAME --pretrained FILE"),
        ("local-dir:there", "--model NAME --pretrained FILE"),
        ("", "leave out --model"),
        ("\x1b[2J", "some of its names: ViT-B-32"),
    ],
)
def test_an_unknown_model_name_is_refused_with_what_to_give_instead(name, instead):
    with pytest.raises(UnknownModel) as caught:
        find_model(name)
    assert instead in str(caught.value)


def test_adapters_determine_model_and_weights(write):
    folder = write()
    assert choose_model(None, folder) == "mini"
    assert choose_weights(None, "mini", folder) is None  # the adapter's weights are mini's default
    assert choose_weights("random", "mini", folder) == "random"


def test_without_adapters_the_default_model_is_used(tmp_path):
    for folder in (None, tmp_path, tmp_path / "absent"):
        assert choose_model(None, folder) == "ViT-B-16"
        assert choose_weights(None, "ViT-B-16", folder) is None
    assert choose_model("mini", tmp_path) == "mini"


@pytest.mark.parametrize(
    ("model", "tag"), [("ViT-B-32", "laion2b_s34b_b79k"), ("ViT-B-16", "openai"), ("mini", "random")]
)
def test_weights_with_an_open_clip_tag_are_chosen_by_it(model, tag, write):
    folder = write(model_name=model, pretrained=tag)
    assert choose_model(None, folder) == model
    assert choose_weights(None, model, folder) == tag


@pytest.mark.parametrize("model", ["ViT-B-16", "mini"])
def test_weights_from_a_file_must_be_given_again_and_the_error_has_their_fingerprint(model, write, mini, tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"")  # files named in an adapter are never opened
    folder = write(model_name=model, pretrained=str(tmp_path / "weights.pt"))
    with pytest.raises(WrongBase, match=rf"base {mini.fingerprint[:8]}\), weights from a file; .*--pretrained FILE"):
        choose_weights(None, model, folder)
    assert choose_weights("mine.pt", model, folder) == "mine.pt"


def test_adapters_of_two_models_in_one_folder_are_refused(write):
    folder = write("flags", model_name="ViT-B-16", pretrained="openai", base_fingerprint="ab" * 32)
    write("digits")
    with pytest.raises(WrongBase, match=r"'digits' is of mini \(mini, base .*'flags' is of ViT-B-16 \(openai, base ab"):
        choose_model(None, folder)


def test_a_model_that_contradicts_the_adapters_is_refused(write):
    folder = write()
    with pytest.raises(WrongBase, match=r"'digits' is of mini .*--model says ViT-B-16; leave out --model"):
        choose_model("vit-b/16", folder)


def test_two_names_of_one_architecture_do_not_contradict_each_other(write):
    folder = write(model_name="ViT-B-16", pretrained="openai")
    assert choose_model("ViT-B-16-quickgelu", folder) == "ViT-B-16-quickgelu"


def test_files_that_are_not_adapters_are_ignored_when_choosing_the_model(write, tmp_path):
    folder = write()
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 40)
    (tmp_path / "._digits.safetensors").write_bytes(b"")
    assert choose_model(None, folder) == "mini"


def test_fit_and_evaluate_use_the_model_of_the_adapters(adapters, capsys):
    main(["fit", "--task", "flags", "--adapters", str(adapters), "--dry-run", "--json"])
    assert '"trainable_parameters": 539856' in capsys.readouterr().out  # the number of mini with its preset
    main(["evaluate", "--tasks", "emoji", "--adapters", str(adapters), "--json"])
    assert '"model": "mini"' in capsys.readouterr().out


def test_a_contradiction_is_refused_before_torch_is_imported(adapters, tmp_path):
    for room, arguments in (
        ("trainer", ["evaluate", "--tasks", "emoji", "--model", "ViT-B-16"]),
        ("exporter", ["merge", "--to", "onnx", "--model", "ViT-B-16"]),
    ):
        code = (
            f"import sys; sys.argv = {[room, *arguments, '--adapters', str(adapters)]!r}\n"
            f"from clipweld.{room}.cli import main\ntry: main()\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
        assert done.stdout.splitlines()[-1] == "False"
        assert "--model says ViT-B-16" in done.stderr
