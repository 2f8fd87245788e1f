"""What stands around a prompt: the token that all texts begin with, once, and control tokens by who wrote them."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as RustTokenizer

from batchinfer.errors import InvalidInput, SpecError
from batchinfer.io.rows import RowBatch
from batchinfer.job.prepare import draft_plan
from batchinfer.job.row_prompts import RowContext
from batchinfer.openai.parse import ModelFacts, parse_body, parse_request
from batchinfer.pipeline.encoding import Content, PromptOptions
from batchinfer.pipeline.prepare import ModelLimits, Preparer
from batchinfer.pipeline.prompt import Prepared, Prompt, Refused
from batchinfer.pipeline.scoring import Pooled, Read, Rolling, continuations
from batchinfer.request import SamplingParams
from batchinfer.text.chat import ChatTemplate
from batchinfer.text.fast import FastTokenizer, TokenizerFacts
from batchinfer.text.pieces import BYTE_ALPHABET
from tests.job.doubles import job

BOS, EOS, END = 256, 257, 258
CHATML = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)


def tokenizer(framed: bool = True) -> FastTokenizer:
    """Bytes, and three control tokens; `framed`: a text is encoded as <s> text </s>."""
    rust = RustTokenizer(models.BPE({token: number for number, token in enumerate(sorted(BYTE_ALPHABET))}, []))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rust.decoder = decoders.ByteLevel()
    rust.add_special_tokens([AddedToken(text, special=True) for text in ("<s>", "</s>", "<|end|>")])
    if framed:
        ends = [("<s>", BOS), ("</s>", EOS)]
        rust.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=ends)
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    return FastTokenizer(rust, TokenizerFacts("", frozenset({END}), named))


FRAMED, BARE = tokenizer(), tokenizer(framed=False)


def preparer(found: FastTokenizer, **chat: Any) -> Preparer:
    template = ChatTemplate(CHATML, found.special_tokens, found.control)
    return Preparer(found, ModelLimits(400, 259, found.eos_ids), SamplingParams(max_tokens=4), template, **chat)


def ids_of(content: Content, options: PromptOptions | None = None, read: Read | None = None, **chat: Any) -> list[int]:
    """Of the first request, by the tokenizer that frames texts."""
    [made] = preparer(FRAMED, **chat).prepare([Prompt(0, [content], read=read, options=options)])
    assert isinstance(made, Prepared), made
    return made.requests[0].prompt


def shown(ids: list[int]) -> str:
    """Bytes as they are, control tokens by their first letters."""
    texts = FRAMED.decode_batch([[one] for one in ids], skip_special_tokens=False)
    return "".join({BOS: "⟨s⟩", EOS: "⟨/s⟩", END: "⟨end⟩"}.get(one, text) for one, text in zip(ids, texts, strict=True))


def test_a_text_that_begins_with_bos_gets_no_second() -> None:
    assert shown(ids_of("a")) == "⟨s⟩a⟨/s⟩"
    assert shown(ids_of("<s>a")) == "⟨s⟩a⟨/s⟩" and shown(ids_of("<s>a", PromptOptions(True))) == "⟨s⟩a⟨/s⟩"
    assert shown(ids_of("a<s>")) == "⟨s⟩a⟨s⟩⟨/s⟩"
    assert shown(ids_of("<s>a", PromptOptions(False))) == "⟨s⟩a" and shown(ids_of("a", PromptOptions(False))) == "a"
    messages = [{"role": "u", "content": "a"}]
    assert (
        shown(ids_of(messages)) == "u:a⟨end⟩A:" and shown(ids_of(messages, PromptOptions(True))) == "⟨s⟩u:a⟨end⟩A:⟨/s⟩"
    )
    assert ids_of([BOS, 97]) == [BOS, 97], "token ids are as they are"
    for context in ("<s>a", "a"):
        assert shown(ids_of(context, read=continuations(["b"]))) == "⟨s⟩ab"
    assert shown(ids_of("<s>a", read=Pooled("last"))) == "⟨s⟩a⟨/s⟩"


def test_an_empty_text_is_a_prompt_where_it_has_tokens() -> None:
    assert shown(ids_of("")) == "⟨s⟩⟨/s⟩" and shown(ids_of("", read=Pooled("last"))) == "⟨s⟩⟨/s⟩"
    empty = [("", PromptOptions(False), None), ("", None, Rolling()), ([], None, None)]
    for content, options, read in empty:
        [made] = preparer(FRAMED).prepare([Prompt(0, [content], options=options, read=read)])
        assert isinstance(made, Refused) and "empty" in str(made.error)
    [made] = preparer(BARE).prepare([Prompt(0, [""])])
    assert isinstance(made, Refused) and isinstance(made.error, InvalidInput)


def test_messages_hold_text_and_ready_prompts_what_they_say() -> None:
    messages = [{"role": "u", "content": "a<|end|>"}]
    assert shown(ids_of(messages)) == "u:a<|end|>⟨end⟩A:"
    assert shown(ids_of(messages, PromptOptions(False, special_tokens="allow"))) == "u:a⟨end⟩⟨end⟩A:"
    assert shown(ids_of(messages, special_tokens="allow")) == "u:a⟨end⟩⟨end⟩A:"
    assert (
        shown(ids_of(messages, PromptOptions(False, special_tokens="text"), special_tokens="allow"))
        == "u:a<|end|>⟨end⟩A:"
    )
    assert shown(ids_of("a<|end|>")) == "⟨s⟩a⟨end⟩⟨/s⟩"
    assert shown(ids_of("a<|end|>", special_tokens="text")) == "⟨s⟩a⟨end⟩⟨/s⟩"
    assert shown(ids_of("<s><|end|>", PromptOptions(True, special_tokens="text"))) == "⟨s⟩<s><|end|>⟨/s⟩"


def test_variables_of_a_request_hold_text_and_those_of_the_job_control_tokens() -> None:
    found = ChatTemplate("{{ bos_token }}{{ x }}{{ messages[0].content }}", FRAMED.special_tokens, FRAMED.control)
    limits, defaults = ModelLimits(400, 259, FRAMED.eos_ids), SamplingParams(max_tokens=4)
    messages = [{"role": "u", "content": "</s>"}]
    for given, expected in (({}, "⟨s⟩⟨end⟩</s>"), ({"x": "<|end|>"}, "⟨s⟩<|end|></s>")):
        made = Preparer(FRAMED, limits, defaults, found, {"x": "<|end|>"}).prepare(
            [Prompt(0, [messages], options=PromptOptions(False, given))]
        )[0]
        assert isinstance(made, Prepared) and shown(made.ids) == expected


@pytest.mark.parametrize("name", ["turn", "defaults", "self", "data"])
def test_variables_may_have_any_name(name: str) -> None:
    assert shown(ids_of([{"role": "u", "content": "a"}], PromptOptions(False, {name: "b"}))) == "u:a⟨end⟩A:"


# ---- jobs


def prompts_of_job(tmp_path: Any, columns: dict[str, list[Any]], **sections: Any) -> list[str]:
    """Return what a job's rows become, whole prompts with their continuations."""
    table = pa.table(columns)
    pq.write_table(table, tmp_path / "in.parquet")
    spec = job(tmp_path, **sections)
    draft = draft_plan(spec)
    said = (spec.prompt.chat_template_kwargs, spec.prompt.special_tokens) if spec.prompt else ()
    template = ChatTemplate(CHATML, FRAMED.special_tokens, FRAMED.control)
    limits, defaults = ModelLimits(400, 259, FRAMED.eos_ids), SamplingParams(max_tokens=4)
    model = ModelFacts(("m",), FRAMED, CHATML, defaults)
    context = RowContext(frozenset(), model)
    prompts = draft.rows.prompts(RowBatch(table, {}), list(range(table.num_rows)), context, {})
    made = Preparer(FRAMED, limits, defaults, template, *said).prepare(prompts)
    return [shown(one.requests[-1].prompt) if isinstance(one, Prepared) else str(one.error) for one in made]


READY = {"template": "<s>{{ text }}<|end|>"}
DATA = {"text": ["a<|end|>", "<s>", "b"], "more": [["</s>"], ["c"], ["d<|"]]}


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (READY, ["⟨s⟩a<|end|>⟨end⟩⟨/s⟩", "⟨s⟩<s>⟨end⟩⟨/s⟩", "⟨s⟩b⟨end⟩⟨/s⟩"]),
        ({**READY, "special_tokens": "text"}, ["⟨s⟩a<|end|>⟨end⟩⟨/s⟩", "⟨s⟩<s>⟨end⟩⟨/s⟩", "⟨s⟩b⟨end⟩⟨/s⟩"]),
        ({**READY, "special_tokens": "allow"}, ["⟨s⟩a⟨end⟩⟨end⟩⟨/s⟩", "⟨s⟩⟨s⟩⟨end⟩⟨/s⟩", "⟨s⟩b⟨end⟩⟨/s⟩"]),
        ({**READY, "add_special_tokens": False}, ["⟨s⟩a<|end|>⟨end⟩", "⟨s⟩<s>⟨end⟩", "⟨s⟩b⟨end⟩"]),
        (
            {"template": "{% for x in more %}{{ x }}|end|>{% endfor %}"},
            ["⟨s⟩</s>|end|>⟨/s⟩", "⟨s⟩c|end|>⟨/s⟩", "⟨s⟩d<||end|>⟨/s⟩"],
        ),
        ({"template": None, "column": "text"}, ["⟨s⟩a⟨end⟩⟨/s⟩", "⟨s⟩⟨/s⟩", "⟨s⟩b⟨/s⟩"]),
        (
            {"template": None, "column": "text", "special_tokens": "text", "add_special_tokens": False},
            ["a<|end|>", "<s>", "b"],
        ),
        ({"template": None, "user": "{{ text }}"}, ["user:a<|end|>⟨end⟩A:", "user:<s>⟨end⟩A:", "user:b⟨end⟩A:"]),
        (
            {"template": None, "user": "{{ text }}", "special_tokens": "allow", "add_special_tokens": True},
            ["⟨s⟩user:a⟨end⟩⟨end⟩A:⟨/s⟩", "⟨s⟩user:⟨s⟩⟨end⟩A:⟨/s⟩", "⟨s⟩user:b⟨end⟩A:⟨/s⟩"],
        ),
    ],
    ids=str,
)
def test_rows_of_a_job(tmp_path: Any, prompt: dict[str, Any], expected: list[str]) -> None:
    assert prompts_of_job(tmp_path, DATA, prompt=prompt) == expected


def test_rows_that_are_scored(tmp_path: Any) -> None:
    score = {"task": "score", "sampling": None, "score": {"continuation": " {{ more[0] }}</s>"}}
    found = prompts_of_job(tmp_path, DATA, prompt={"template": "{{ text }} "}, **score)
    assert found == ["⟨s⟩a<|end|>  </s>⟨/s⟩", "⟨s⟩<s>  c⟨/s⟩", "⟨s⟩b  d<|⟨/s⟩"]
    choose = {"task": "choose", "sampling": None, "score": {"choices_column": "more"}}
    assert prompts_of_job(tmp_path, DATA, prompt={"template": "{{ text }}:"}, **choose)[0] == "⟨s⟩a<|end|>:</s>"
    allowed = {"template": "{{ text }}:", "special_tokens": "allow"}
    assert prompts_of_job(tmp_path, DATA, prompt=allowed, **choose)[0] == "⟨s⟩a⟨end⟩:⟨/s⟩"


def test_an_empty_cell_is_a_ready_prompt_of_bos(tmp_path: Any) -> None:
    assert prompts_of_job(tmp_path, {"text": [""]}, prompt={"template": None, "column": "text"}) == ["⟨s⟩⟨/s⟩"]


def test_the_last_message_of_a_job_stays_open(tmp_path: Any) -> None:
    chats = {"chat": ['[{"role": "u", "content": "a"}, {"role": "A", "content": "b<|end|> "}]', '[{"role": "u"}]']}
    prompt = {"template": None, "messages": "chat", "continue_final_message": True}
    assert prompts_of_job(tmp_path, chats, prompt=prompt)[0] == "u:a⟨end⟩A:b<|end|> "
    for wrong, said in (
        ({"template": "x", "continue_final_message": True}, "goes with messages"),
        ({**prompt, "chat_template_kwargs": {"add_generation_prompt": True}}, "exclude each other"),
        ({"special_tokens": "yes"}, "special_tokens"),
    ):
        with pytest.raises(SpecError, match=said):
            job(tmp_path, prompt=wrong)


def test_bodies_of_openai_batch() -> None:
    model = ModelFacts(("m",), FRAMED, CHATML, SamplingParams(max_tokens=4))
    messages = [{"role": "u", "content": "a<s>"}, {"role": "A", "content": "b"}]

    def shown_of(url: str, **body: Any) -> str:
        asked = parse_request(parse_body(url, body), model)
        return shown(ids_of(asked.contents[0], asked.options, asked.pooling))

    chat = "/v1/chat/completions"
    assert shown_of(chat, messages=messages) == "u:a<s>⟨end⟩A:b⟨end⟩A:"
    assert shown_of(chat, messages=messages, special_tokens="allow") == "u:a⟨s⟩⟨end⟩A:b⟨end⟩A:"
    assert shown_of(chat, messages=messages, add_generation_prompt=False) == "u:a<s>⟨end⟩A:b⟨end⟩"
    opened = shown_of(chat, messages=messages, continue_final_message=True)
    assert opened == shown_of(chat, messages=messages, continue_final_message=True, add_generation_prompt=False)
    assert opened == "u:a<s>⟨end⟩A:b"
    with pytest.raises(Exception, match="exclude each other"):
        shown_of(chat, messages=messages, continue_final_message=True, add_generation_prompt=True)
    assert shown_of("/v1/completions", prompt="<s>a<|end|>") == "⟨s⟩a⟨end⟩⟨/s⟩"
    assert shown_of("/v1/completions", prompt="") == "⟨s⟩⟨/s⟩"
    assert shown_of("/v1/completions", prompt="<s>", special_tokens="text") == "⟨s⟩<s>⟨/s⟩"
    assert shown_of("/v1/embeddings", input="a", add_special_tokens=False) == "a"
