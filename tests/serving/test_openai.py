"""OpenAI's own client against a server of ours whose model says what it is told to (`parrot`).

Not covered: a model that decides what to say; the tests of the engine are about that.
"""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import openai
import pytest
from PIL import Image

from tests import tiny_vlm
from tests.serving import parrot

TOOL = {"type": "function", "function": {
    "name": "zoom", "description": "A part of the picture.",
    "parameters": {"type": "object", "properties": {"where": {"type": "string"}, "n": {"type": "integer"}}},
}}  # fmt: skip
ASK = [{"role": "user", "content": "What is it?"}]


@pytest.fixture(scope="module")
def client(bird):
    with openai.OpenAI(base_url=f"{bird.url}/v1", api_key=parrot.KEY, max_retries=0) as client:
        yield client


def ask(client, messages=ASK, **settings):
    return client.chat.completions.create(model=parrot.NAME, messages=messages, **settings)


def data_uri(size=(24, 16), seed: int = 0) -> str:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def picture(**settings) -> dict:
    return {"type": "image_url", "image_url": {"url": data_uri(**settings)}}


def test_an_answer_in_one_body(bird, client):
    said = bird.say("a red heart")
    answer = ask(client)
    assert answer.choices[0].message.content == "a red heart" and answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == len(said) and answer.model == parrot.NAME
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + len(said)
    assert [model.id for model in client.models.list()] == [parrot.NAME]
    about = client.models.retrieve(parrot.NAME)
    assert about.max_model_len == 512 and about.input_modalities == ["text", "image", "video"]


def test_a_stream_says_what_the_body_says(bird, client):
    bird.say("look", "</think>", "a heart ", *parrot.call("zoom", where="top left"), "<|observation|>",
             after=["<think>"])  # fmt: skip
    settings = dict(tools=[TOOL], extra_body={"chat_template_kwargs": {"enable_thinking": True}})
    whole = ask(client, **settings).choices[0]
    thought, text, calls, reasons, usage = "", "", [], [], None
    for chunk in ask(client, stream=True, stream_options={"include_usage": True}, **settings):
        if chunk.usage:
            usage = chunk.usage
            assert not chunk.choices
            continue
        delta = chunk.choices[0].delta
        thought += getattr(delta, "reasoning_content", None) or ""
        text += delta.content or ""
        calls += delta.tool_calls or []
        reasons += [chunk.choices[0].finish_reason] if chunk.choices[0].finish_reason else []
    assert (thought, text, reasons) == ("look", "a heart", ["tool_calls"]) and usage.completion_tokens > 4
    assert [(c.index, c.function.name, json.loads(c.function.arguments)) for c in calls] == [
        (0, "zoom", {"where": "top left"})
    ]
    assert whole.message.reasoning_content == thought and whole.message.content == text
    (call,) = whole.message.tool_calls
    assert (call.function.name, call.function.arguments) == ("zoom", calls[0].function.arguments)
    assert whole.finish_reason == "tool_calls" and call.id != calls[0].id


def test_pictures_and_their_tools_results_reach_the_model(bird, client):
    """A picture is as many tokens as it is, and read once; one in a tool's message too."""
    bird.say("two hearts")
    text = ask(client, [{"role": "user", "content": [{"type": "text", "text": "What is it?"}]}]).usage.prompt_tokens
    asked = [{"role": "user", "content": [picture(), {"type": "text", "text": "What is it?"}]}]
    encoded = bird.engine.counts.encoded
    one = ask(client, asked).usage.prompt_tokens
    merged = one - text - 2  # begin and end of the image
    assert 1 <= merged <= 16 and bird.engine.counts.encoded == encoded + 1
    call = {"id": "1", "type": "function", "function": {"name": "zoom", "arguments": '{"n": 2}'}}
    more = [*asked, {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": [picture(seed=1)]},
            {"role": "user", "content": [picture()]}]  # fmt: skip
    two = ask(client, more, tools=[TOOL]).usage.prompt_tokens
    assert two > one + 2 * merged and bird.engine.counts.encoded == encoded + 2


def test_ids_and_log_probabilities_are_the_engines(bird, client):
    said = bird.say("a red", "<|begin_of_box|>", "heart", "<|end_of_box|>")
    settings = dict(logprobs=True, temperature=1.0, seed=3, extra_body={"return_token_ids": True})
    answer = ask(client, **settings)
    chosen = answer.choices[0]
    assert chosen.token_ids == said and len(answer.prompt_token_ids) == answer.usage.prompt_tokens
    assert chosen.message.content == "a red<|begin_of_box|>heart<|end_of_box|>"
    probabilities = np.exp([token.logprob for token in chosen.logprobs.content])
    assert len(probabilities) == len(said) and (probabilities > 0.99).all()
    assert [token.token for token in chosen.logprobs.content][-1] == "<|user|>"
    chunks = list(ask(client, stream=True, **settings))
    assert sum((chunk.choices[0].token_ids for chunk in chunks if hasattr(chunk.choices[0], "token_ids")), []) == said
    likely = [chunk.choices[0].logprobs.content for chunk in chunks if chunk.choices[0].logprobs]
    np.testing.assert_allclose(np.exp([token.logprob for part in likely for token in part]), probabilities, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_the_likeliest_tokens_are_those_of_the_models_logits(bird, client, temperature):
    """By one pass over prompt and answer without a cache, from whose logits on it is float64."""
    tree = tiny_vlm.params(parrot.CFG, 1)
    bird.front.set_params(tree, bird.engine.version + 1).result()
    settings = dict(logprobs=True, top_logprobs=4, temperature=temperature, seed=1, max_tokens=12,
                    extra_body={"return_token_ids": True})  # fmt: skip
    answer = ask(client, **settings)
    drawn, places = answer.choices[0].token_ids, answer.choices[0].logprobs.content
    ids = np.array(answer.prompt_token_ids + drawn)
    row = {"tokens": ids, "image_row": np.full(len(ids), -1), "positions": np.arange(len(ids))[:, None].repeat(3, 1),
           "patches": np.zeros((0, 24)), "yx": np.zeros((0, 2), int), "frame": np.zeros(0, int)}  # fmt: skip
    logits = tiny_vlm.forward(parrot.CFG, tree, [row], len(ids), 4)[0, -len(drawn) - 1 : -1].astype(np.float64)
    logits /= temperature or 1.0
    full = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for chosen, place, wanted in zip(drawn, places, full, strict=True):
        top = np.argsort(-wanted)[:4]
        assert [x.token for x in place.top_logprobs] == [parrot.TOKENIZER.decode([i], keep_special=True) for i in top]
        np.testing.assert_allclose([x.logprob for x in place.top_logprobs], wanted[top], atol=1e-4)
        assert abs(place.logprob - wanted[chosen]) < 1e-4
        assert [x.logprob for x, i in zip(place.top_logprobs, top) if i == chosen] == [place.logprob] * (chosen in top)
    assert temperature or any(chosen == wanted.argmax() for chosen, wanted in zip(drawn, full))
    chunks = [chunk.choices[0].logprobs.content for chunk in ask(client, stream=True, **settings)
              if chunk.choices and chunk.choices[0].logprobs]  # fmt: skip
    assert [place.top_logprobs for chunk in chunks for place in chunk] == [place.top_logprobs for place in places]
    plain = ask(client, **settings | {"top_logprobs": 0}).choices[0]
    assert plain.token_ids == drawn and all(not place.top_logprobs for place in plain.logprobs.content)


def test_stop_length_and_choices(bird, client):
    bird.say("one two three four five")
    assert ask(client, stop=["three"]).choices[0].message.content == "one two "
    cut = ask(client, max_tokens=2).choices[0]
    assert cut.finish_reason == "length" and "one two three four five".startswith(cut.message.content)
    assert ask(client, max_completion_tokens=2).usage.completion_tokens == 2
    several = ask(client, n=3, temperature=0)
    assert [c.index for c in several.choices] == [0, 1, 2] and len({c.message.content for c in several.choices}) == 1
    indices = {c.choices[0].index for c in ask(client, n=3, stream=True) if c.choices}
    assert indices == {0, 1, 2}


def test_a_seed_repeats_an_answer_and_another_gives_another(bird, client):
    """With a head of zeros, under which every token is as likely as any."""
    tree = parrot.params(parrot.ids("x"))
    tree["decoder"]["head"] = np.zeros_like(tree["decoder"]["head"])
    bird.front.set_params(tree, bird.engine.version + 1).result()
    drawn = [ask(client, seed=seed, max_tokens=8, extra_body={"return_token_ids": True}).choices[0].token_ids
             for seed in (5, 5, 6)]  # fmt: skip
    assert drawn[0] == drawn[1] != drawn[2]
    assert ask(client, temperature=0, max_tokens=4) and ask(client, seed=-1, top_p=0.5, max_tokens=4)


def test_a_call_can_be_demanded_and_forbidden(bird, client):
    bird.say("where", "</arg_key>", "<arg_value>", "left", "</arg_value>", "</tool_call>", "<|observation|>",
             after=["<arg_key>"])  # fmt: skip
    needs = json.loads(json.dumps(TOOL))
    needs["function"]["parameters"]["required"] = ["where"]
    named = {"type": "function", "function": {"name": "zoom"}}
    chosen = ask(client, tools=[needs], tool_choice=named).choices[0]
    assert chosen.message.tool_calls[0].function.arguments == '{"where": "left"}'
    assert chosen.finish_reason == "tool_calls"

    bird.say(*parrot.ids("zoom", "</tool_call>"), after=["<tool_call>"])
    chosen = ask(client, tools=[TOOL], tool_choice="required").choices[0]
    assert chosen.message.tool_calls[0].function.name == "zoom" and not chosen.message.content
    tokens = ask(client, tools=[TOOL], tool_choice="none", max_tokens=1).usage.prompt_tokens
    assert tokens == ask(client, max_tokens=1).usage.prompt_tokens


WRONG = {
    "messages": {"messages": []}, "messages[0].role": {"messages": [{"role": "wizard", "content": "x"}]},
    "messages[0].content": {"messages": [{"role": "user"}]},
    "messages[0].content[0]": {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
    "messages[0].content[0].image_url": {
        "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]
    },
    "temperature": {"temperature": -1}, "top_p": {"top_p": 0}, "n": {"n": 0}, "max_tokens": {"max_tokens": 0},
    "top_logprobs": {"top_logprobs": 3}, "frequency_penalty": {"frequency_penalty": 0.5},
    "tool_choice": {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "other"}}},
    "tools[0].function": {"tools": [{"type": "function"}]}, "stop": {"stop": [""]},
    "response_format": {"response_format": {"type": "json_object"}},
}  # fmt: skip


@pytest.mark.parametrize("field", WRONG)
def test_what_is_wrong_is_named(client, field):
    with pytest.raises(openai.BadRequestError) as raised:
        ask(client, **({"messages": ASK} | WRONG[field]))
    assert raised.value.param == field and raised.value.type == "invalid_request_error"


@pytest.mark.parametrize("call", [
    5, {"function": "zoom"}, {"function": {"name": "zoom", "arguments": '{"a": "\\ud800"}'}},
    {"function": {"name": "zoom", "arguments": "[" * 100_000}},
], ids=range(4))  # fmt: skip
def test_calls_that_are_none_are_no_bugs(client, call):
    with pytest.raises(openai.BadRequestError) as raised:
        ask(client, [*ASK, {"role": "assistant", "tool_calls": [call]}, *ASK])
    assert raised.value.param == "messages"


@pytest.mark.parametrize("choice", [{"function": 5}, {"function": "zoom"}, {"name": ["zoom"]}, {}, [], 0, ""], ids=str)
def test_choices_that_are_none_are_no_bugs(client, choice):
    with pytest.raises(openai.BadRequestError, match="tool_choice"):
        ask(client, tools=[TOOL], tool_choice=choice)
    with pytest.raises(openai.BadRequestError, match="stop_token_ids has to be a whole number"):
        client.completions.create(model=parrot.NAME, prompt=[1, 2], extra_body={"stop_token_ids": [[5]]})


def test_wrong_names_keys_and_lengths(bird, client):
    with pytest.raises(openai.NotFoundError, match="there is parrot"):
        client.chat.completions.create(model="gpt", messages=ASK)
    with pytest.raises(openai.AuthenticationError, match="API key"):
        ask(client.with_options(api_key="wrong"))
    with pytest.raises(openai.BadRequestError, match="shorten it"):
        ask(client, [{"role": "user", "content": "heart and star " * 300}])
    with pytest.raises(openai.BadRequestError, match="64 pixels|patches|visual tokens"):
        ask(client, [{"role": "user", "content": [picture(seed=n) for n in range(20)]}])
