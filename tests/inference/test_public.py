"""Answers of a public checkpoint against transformers' `generate` on the same random weights, and wrong input.

Not covered: released weights, videos (test_films.py), sampling at a temperature (the sampler's own test).
"""

from __future__ import annotations

import json
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from glmv_jax import cli  # noqa: E402
from glmv_jax.data.processor import Processor  # noqa: E402
from glmv_jax.train import exchange  # noqa: E402
from glmv_jax.typing import UserError  # noqa: E402
from tests.data import json_vocabulary  # noqa: E402
from tests.interop import hf_glm_ocr  # noqa: E402
from tests.interop.test_glm_ocr import hf_config, randomise  # noqa: E402

TEMPLATES = pathlib.Path(__file__).parent.parent / "data" / "templates"
IMAGE, EOS = 100, (7, 11)
PIXELS = {"shortest_edge": 8 * 8 * 2 * 2, "longest_edge": 8 * 8 * 2 * 12}  # of a picture: 2 to 12 visual tokens


def image_processor():
    from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil

    return Glm46VImageProcessorPil(size=PIXELS, patch_size=4, temporal_patch_size=2, merge_size=2)


def picture(path, width: int, height: int, seed: int = 0):
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """A folder that transformers wrote, with its image processor, and the model in it."""
    folder = tmp_path_factory.mktemp("public") / "hf"
    model = hf_glm_ocr.write(folder)
    with torch.no_grad():  # so that different contexts give different answers
        model.lm_head.weight.mul_(3)
        model.model.language_model.embed_tokens.weight.mul_(4)
    model.save_pretrained(folder)
    image_processor().save_pretrained(folder)
    transformers.GenerationConfig(eos_token_id=list(EOS), pad_token_id=0).save_pretrained(folder)
    return folder, model


@pytest.fixture(scope="module")
def ours(hf):
    exchange.import_hf(hf[0], hf[0].parent / "ours")
    return hf[0].parent / "ours"


def theirs(model, ids, images=(), n: int = 12, image: int = IMAGE, eos=EOS) -> tuple[list[int], list[float]]:
    """Greedy ids of transformers, and their log-probabilities from its logits."""
    ids, vision = torch.tensor([ids]), {}
    if images:
        vision = dict(image_processor()([Image.open(p) for p in images], return_tensors="pt"))
    out = model.generate(
        ids, mm_token_type_ids=(ids == image).int(), **vision, max_new_tokens=n, do_sample=False,
        eos_token_id=list(eos), pad_token_id=0, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    new = out.sequences[0, ids.shape[1]:].tolist()
    return new, [float(torch.log_softmax(x[0].double(), -1)[i]) for x, i in zip(out.logits, new)]


def stops(tokenizer) -> list[int]:
    return tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|user|>"])


def write_talking(folder: pathlib.Path):
    """A folder with a tokenizer and a chat template, and its model: ids of the tokenizer are those of the model."""
    folder.mkdir()
    json_vocabulary.write(folder, **{"chat_template.jinja": (TEMPLATES / "spaced.jinja").read_text()})
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    config = hf_config()
    config.text_config.vocab_size = 512
    config.image_token_id, config.video_token_id = tokenizer.convert_tokens_to_ids(["<|image|>", "<|video|>"])
    torch.manual_seed(0)
    model = transformers.GlmOcrForConditionalGeneration(config).eval()
    randomise(model)
    model.save_pretrained(folder)
    image_processor().save_pretrained(folder)
    transformers.GenerationConfig(eos_token_id=stops(tokenizer), pad_token_id=0).save_pretrained(folder)
    return folder, model, tokenizer


@pytest.fixture(scope="module")
def talking(tmp_path_factory):
    return write_talking(tmp_path_factory.mktemp("talking") / "hf")


def test_messages_with_images_and_tools_are_answered_as_theirs(talking, capsys, tmp_path):
    folder, model, tokenizer = talking
    images = [picture(tmp_path / "a.png", 37, 21), picture(tmp_path / "b.png", 9, 50, 1)]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "the cat?"}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "zoom", "arguments": '{"n": 3}'}}]},
        {"role": "tool", "content": [{"type": "image", "image": images[1]}]},
    ]
    tools = [{"type": "function", "function": {"name": "zoom", "parameters": {}}}]
    (tmp_path / "chat.json").write_text(json.dumps({"messages": messages, "tools": tools}))
    got = answer(capsys, folder, "--messages", tmp_path / "chat.json", "--image", images[0], "--max-new-tokens", 8)

    messages[2]["tool_calls"][0]["function"]["arguments"] = {"n": 3}
    text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
    for grid in image_processor()([Image.open(p) for p in images])["image_grid_thw"]:
        text = text.replace("<|image|>", "<|IMAGE|>" * (int(grid.prod()) // 4), 1)  # as their processors do
    ids = tokenizer(text.replace("<|IMAGE|>", "<|image|>"), add_special_tokens=False)["input_ids"]
    want, logprobs = theirs(model, ids, images, 8, image=model.config.image_token_id, eos=stops(tokenizer))
    assert got["token_ids"] == want
    np.testing.assert_allclose(got["logprobs"], logprobs, atol=2e-4)
    assert got["text"] == tokenizer.decode(want[:-1] if got["finished"] else want)


def test_a_question_and_what_is_printed(talking, capsys):
    folder, model, tokenizer = talking
    argv = ["generate", "--checkpoint", str(folder), "--prompt", "the cat?", "--max-new-tokens", "5"]
    assert cli.main(argv) == 0
    lines = capsys.readouterr().out
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "the cat?"}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    want, logprobs = theirs(model, ids, (), 5, image=-1, eos=stops(tokenizer))
    assert lines.endswith(
        f"token ids: {spelt(want)}\nlogprobs: {','.join(f'{x:.4f}' for x in logprobs)}\n"
    ), lines
    warm = [answer(capsys, folder, *argv[3:], "--temperature", "1", "--seed", seed)["token_ids"] for seed in (1, 1, 2)]
    assert warm[0] == warm[1] != warm[2]


def test_wrong_messages_are_one_line(talking, hf, capsys, tmp_path):
    def refused(text: str, *argv, folder=talking[0]) -> str:
        (tmp_path / "chat.json").write_text(text)
        capsys.readouterr()
        given = ["--checkpoint", str(folder), "--messages", str(tmp_path / "chat.json")]
        assert cli.main(["generate", *given, *argv]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1
        return err

    assert "chat.json cannot be read" in refused("{")
    assert "holds no messages" in refused('{"message": []}')
    assert "message 1 has no role" in refused('[{"content": "x"}]')
    one = json.dumps([{"role": "user", "content": [{"type": "image"}]}])
    assert "more image placeholders" in refused(one)
    assert "has no tokenizer.json" in refused('[{"role": "user", "content": "x"}]', folder=hf[0])
    spelt = json.dumps([{"role": "user", "content": "x <|image|>"}])  # a person's, so no placeholder
    assert "was made for 512" in refused(spelt, "--max-new-tokens", "600")
    assert "no list of messages" in refused("[]")
    assert cli.main(["generate", "--checkpoint", str(tmp_path / "none"), "--prompt", "x"]) == 2
    assert "is no folder" in capsys.readouterr().err


def answer(capsys, folder, *argv) -> dict:
    assert cli.main(["generate", "--checkpoint", str(folder), "--json", *map(str, argv)]) == 0
    return json.loads(capsys.readouterr().out)


def spelt(ids) -> str:
    return ",".join(map(str, ids))


def test_greedy_ids_of_text_are_theirs(hf, ours, capsys):
    """Of one device; and of four, whose parts of the parameters are read straight to them."""
    folder, model = hf
    rng = np.random.default_rng(0)
    for length in (1, 5, 17):
        ids = rng.integers(12, 99, length).tolist()
        want, logprobs = theirs(model, ids)
        over = ["--mesh", "data=2", "tensor=2"] if length > 1 else []
        for source, more in ((ours, over if length > 5 else []), (folder, over if length == 5 else [])):
            got = answer(capsys, source, "--token-ids", spelt(ids), "--max-new-tokens", 12, *more)
            assert got["token_ids"] == want
            np.testing.assert_allclose(got["logprobs"], logprobs, atol=2e-4)
        assert got["finished"] == (want[-1] in EOS)


def test_an_answer_ends_where_theirs_does(hf, capsys, tmp_path):
    ids = np.random.default_rng(0).integers(12, 99, 9).tolist()
    free, _ = theirs(hf[1], ids)
    ends = [127, free[4]]
    shutil.copytree(hf[0], tmp_path / "hf")
    for file, path in (("generation_config.json", ["eos_token_id"]), ("config.json", ["text_config", "eos_token_id"])):
        want, logprobs = theirs(hf[1], ids, eos=ends)
        said = json.loads((tmp_path / "hf" / file).read_text())
        section = said
        for key in path[:-1]:
            section = section[key]
        section[path[-1]] = ends
        (tmp_path / "hf" / file).write_text(json.dumps(said))
        got = answer(capsys, tmp_path / "hf", "--token-ids", spelt(ids), "--max-new-tokens", 12)
        assert got["token_ids"] == want and want[-1] == free[4] and len(want) <= 5 and got["finished"]
        np.testing.assert_allclose(got["logprobs"], logprobs, atol=2e-4)
        (tmp_path / "hf" / "generation_config.json").unlink(missing_ok=True)  # then config.json says it


@pytest.mark.parametrize("expanded", [False, True])
def test_greedy_ids_after_images_are_theirs(hf, ours, capsys, tmp_path, expanded):
    images = [picture(tmp_path / "a.png", 37, 21), picture(tmp_path / "b.png", 9, 50, 1)]
    counts = [int(g.prod()) // 4 for g in image_processor()([Image.open(p) for p in images])["image_grid_thw"]]
    rng = np.random.default_rng(1)
    words = lambda n: rng.integers(12, 99, n).tolist()  # noqa: E731
    begin, middle, end = words(3), words(2), words(4)
    full = begin + [IMAGE] * counts[0] + middle + [IMAGE] * counts[1] + end
    want, logprobs = theirs(hf[1], full, images)
    given = full if expanded else begin + [IMAGE] + middle + [IMAGE] + end
    got = answer(capsys, ours, "--token-ids", spelt(given), "--image", *images, "--max-new-tokens", 12)
    assert got["token_ids"] == want
    np.testing.assert_allclose(got["logprobs"], logprobs, atol=2e-4)
    swapped = answer(capsys, ours, "--token-ids", spelt(begin + [IMAGE] + middle + [IMAGE] + end), "--image", images[1],
                     "--image", images[0], "--max-new-tokens", 12)  # fmt: skip
    assert swapped["logprobs"] != got["logprobs"]


@pytest.mark.parametrize("size", [(8, 8), (37, 21), (3, 3), (200, 90), (10, 300), (64, 24)])
def test_patches_are_those_of_their_processor(hf, tmp_path, size):
    path = picture(tmp_path / "a.png", *size)
    want = image_processor()(Image.open(path), return_tensors="np")
    patches, yx = Processor(hf[0]).patcher(Image.open(path))
    np.testing.assert_array_equal(yx.max(0) + 1, want["image_grid_thw"][0, 1:])
    from glmv_jax.models.cogvit import normalised

    np.testing.assert_allclose(normalised(patches, 3, 2, 4), want["pixel_values"], atol=2e-6)


def test_without_a_file_the_budget_is_that_of_the_class(hf, tmp_path):
    from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil

    config = json.loads((hf[0] / "config.json").read_text())
    config["vision_config"]["patch_size"] = 14
    (tmp_path / "config.json").write_text(json.dumps(config))
    patcher, standard = Processor(tmp_path).patcher, Glm46VImageProcessorPil()
    for height, width in [(30, 40), (500, 300), (4000, 3000), (20, 2000)]:
        h, w = patcher.size(height, width)
        assert h * w // 14**2 == standard.get_number_of_image_patches(height, width)


def test_wrong_prompts_are_one_line(hf, ours, capsys, tmp_path):
    a = picture(tmp_path / "a.png", 30, 30)

    def refused(*argv) -> str:
        capsys.readouterr()
        assert cli.main(["generate", "--checkpoint", str(ours), *argv]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1
        return err

    assert "1 image placeholders, but 0 images" in refused("--token-ids", f"5,{IMAGE},6")
    assert "0 image placeholders, but 1 images" in refused("--token-ids", "5,6", "--image", a)
    assert "1 image placeholders, but 2 images" in refused("--token-ids", f"5,{IMAGE}", "--image", a, a)
    assert "token id 128 is not in the vocabulary of 128" in refused("--token-ids", "5,128")
    assert "--token-ids 5,x" in refused("--token-ids", "5,x")
    assert "was made for 512" in refused("--token-ids", "5,6", "--max-new-tokens", "511")
    assert "asks for no answer" in refused("--token-ids", "5,6", "--max-new-tokens", "0")
    assert "does not exist" in refused("--token-ids", f"5,{IMAGE}", "--image", str(tmp_path / "none.png"))
    assert "one of --prompt, --messages, --token-ids" in refused()
    assert "one of --prompt, --messages, --token-ids" in refused("--token-ids", "5", "--prompt", "What?")
    assert "--run" in refused("--run", "runs/x", "--token-ids", "5")


def test_an_image_processor_that_the_tower_cannot_follow(hf, tmp_path):
    for file in ("config.json", "preprocessor_config.json"):
        (tmp_path / file).write_text((hf[0] / file).read_text())
    said = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said | {"image_std": [0.5, 0.5, 0.5]}))
    with pytest.raises(UserError, match="image_std"):
        _ = Processor(tmp_path).patcher
    (tmp_path / "preprocessor_config.json").write_text('{"image')
    with pytest.raises(UserError, match="cannot be read"):
        _ = Processor(tmp_path).patcher


def test_drafts_change_no_greedy_answer(tmp_path, capsys):
    """With the MTP layer of the checkpoint; transformers drops it, so a folder that it wrote has none to draft with."""
    hf_glm_ocr.write(tmp_path / "mtp", mtp=1)
    hf_glm_ocr.write(tmp_path / "none")
    argv = ["--token-ids", "5,17,23,9", "--max-new-tokens", "9"]
    plain = answer(capsys, tmp_path / "mtp", *argv)
    drafted = answer(capsys, tmp_path / "mtp", *argv, "--speculative", "2")
    assert drafted["token_ids"] == plain["token_ids"] and len(plain["token_ids"]) == 9
    np.testing.assert_allclose(drafted["logprobs"], plain["logprobs"], atol=1e-4)
    for given, word in ((("--speculative", "-1"), "number of drafts"), (("--speculative", "2"), "no MTP head")):
        assert cli.main(["generate", "--checkpoint", str(tmp_path / "none"), *argv, *given]) == 2
        assert word in capsys.readouterr().err
