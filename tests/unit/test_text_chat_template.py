"""Chat templates against transformers, and what hostile templates and messages can do."""

from __future__ import annotations

import jinja2
import pytest
import transformers

from engine.errors import ConfigError, InvalidRequest
from engine.text.chat_template import ChatTemplate, normalize_messages
from engine.text.tokenizer import Tokenizer
from helpers.tokenizers import byte_level_tokenizer, save_tokenizer

CHATML = """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "You may call:\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role in ('user', 'system') or (message.role == 'assistant' and not message.tool_calls) %}
        {%- if not (tools and loop.first and message.role == 'system') %}
            {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
        {%- endif %}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant' }}
        {%- if message.content %}
            {{- '\\n' + message.content }}
        {%- endif %}
        {%- for call in message.tool_calls %}
            {%- set function = call.function %}
            {{- '\\n<tool_call>{"name": "' + function.name + '", "arguments": ' }}
            {{- function.arguments | tojson }}
            {{- '}</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>' + message.content + '</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}
        {{- '<think></think>' }}
    {%- endif %}
{%- endif %}
"""

LLAMA3 = """{{ bos_token }}
{%- set state = namespace(system='') %}
{% for message in messages %}
    {% if message['role'] == 'system' %}
        {% set state.system = message['content'] | trim %}
        {% continue %}
    {% endif %}
    {% if loop.index0 > 200 %}{% break %}{% endif %}
{% endfor %}
{{- '<|head|>system<|/head|>\\n\\nNow ' + strftime_now('%B %Y') + '\\n' + state.system + '<|eot|>' }}
{% for message in messages if message['role'] != 'system' %}
    {{- '<|head|>' + message['role'] + '<|/head|>\\n\\n' }}
    {% generation %}{{- message['content'] | trim }}{% endgeneration %}
    {{- '<|eot|>' }}
{%- endfor %}
{% if add_generation_prompt %}
    {{- '<|head|>assistant<|/head|>\\n\\n' }}
{% endif %}"""

MISTRAL = """{{ bos_token }}{% for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
    {{- raise_exception('Roles must alternate user/assistant,\\nuser first') }}
{%- endif %}
{%- if message['role'] == 'user' %}
    {{- '[INST] ' + message['content'] + ' [/INST]' }}
{%- elif message['role'] == 'assistant' %}
    {{- ' ' + message['content'] + eos_token }}
{%- else %}
    {{- raise_exception('Unknown role ' ~ message['role']) }}
{%- endif %}{% endfor %}"""

PARTS = """{% for message in messages %}<{{ message.role }}>
{%- if message.content is string %}{{ message.content }}
{%- else %}
    {%- for part in message.content %}{% if part.type == 'text' %}[{{ part.text }}]{% endif %}{% endfor %}
{%- endif %}</{{ message.role }}>
{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""

TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "parts": PARTS}
TOKENS = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}

SYSTEM = {"role": "system", "content": "  Answer in <b>one</b> word & no more.  "}
USER = {"role": "user", "content": "Hi {{ bos_token }} {% raw %} 'é' <|im_end|>\n"}
ASSISTANT = {"role": "assistant", "content": "Hello.  "}
AGAIN = {"role": "user", "content": "And now?"}
CHATS = {
    "one": [USER],
    "three": [USER, ASSISTANT, AGAIN],
    "system": [SYSTEM, USER, ASSISTANT, AGAIN],
    "assistant last": [USER, ASSISTANT],
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The wéather <now>",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
]


def call(arguments) -> dict:
    return {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": arguments}}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tokenizer(byte_level_tokenizer(), tmp_path_factory.mktemp("chat"), config=TOKENS)


@pytest.fixture(scope="module")
def reference(directory):
    """Renders as transformers does; a refusal is None."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)

    def render(template: str, messages, **options) -> str | None:
        options.setdefault("add_generation_prompt", True)
        try:
            return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **options)
        except jinja2.TemplateError:
            return None

    return render


def ours(template: str, messages, /, **options) -> str | None:
    try:
        return ChatTemplate(template, TOKENS).render(messages, **options)
    except InvalidRequest:
        return None


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_prompts_are_those_of_transformers(template, chat, reference):
    source, messages = TEMPLATES[template], CHATS[chat]
    for add_generation_prompt in (True, False):
        expected = reference(source, messages, add_generation_prompt=add_generation_prompt)
        assert ours(source, messages, add_generation_prompt=add_generation_prompt) == expected
        assert (expected is None) == (template == "mistral" and chat == "system")
    if chat == "assistant last":
        expected = reference(source, messages, continue_final_message=True, add_generation_prompt=False)
        assert ours(source, messages, continue_final_message=True) == expected
        assert expected.endswith("Hello." if template == "llama3" else "Hello.  ")


def test_tools_and_tool_calls_are_rendered_as_by_transformers(reference):
    messages = [
        SYSTEM,
        {"role": "user", "content": "Rain in Zürich?"},
        {"role": "assistant", "content": "", "tool_calls": [call({"city": "Zürich", "n": [1, None]})]},
        {"role": "tool", "tool_call_id": "call00001", "content": '{"rain": "<yes> & 5"}'},
    ]
    options = {"tools": TOOLS, "enable_thinking": False}
    expected = reference(CHATML, messages, **options)
    assert '"arguments": {"city": "Zürich", "n": [1, null]}' in expected
    assert "The wéather <now>" in expected
    assert expected.endswith("<think></think>")
    assert ours(CHATML, messages, **options) == expected
    # Clients send arguments as JSON text and content as null: the same prompt.
    messages[2] = {
        "role": "assistant",
        "content": None,
        "name": None,
        "tool_calls": [call('{"city": "Zürich", "n": [1, null]}')],
    }
    assert ours(CHATML, messages, **options) == expected


def test_templates_that_add_arguments_to_text_get_text():
    adding = (
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}{{ 'A:' + c.function.arguments }}"
    )
    printing = adding.replace("'A:' + ", "")
    for source in (adding, printing):
        rendered = ours(
            source + "{% endfor %}{% endfor %}",
            [{"role": "assistant", "content": None, "tool_calls": [call('{"city": "Ulm"}')]}],
        )
        assert rendered.endswith('{"city": "Ulm"}')


def test_arguments_that_are_not_a_json_object_stay_text():
    for arguments in ("{not json", "[1]", "5", "[" * 100_000):
        messages = [{"role": "assistant", "content": None, "tool_calls": [call(arguments)]}]
        (message,) = normalize_messages(messages, keep_parts=False, parse_arguments=True)
        assert message["tool_calls"] == [call(arguments)]


def test_text_parts_follow_the_style_of_the_template(reference):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b {{ x }}"}]
    messages = [{"role": "user", "content": parts}]
    assert ours(PARTS, messages) == reference(PARTS, messages) == "<user>[a][b {{ x }}]</user>\n<assistant>"
    for source in (CHATML, LLAMA3, MISTRAL):
        joined = [{"role": "user", "content": "a\nb {{ x }}"}]
        assert ours(source, messages) == ours(source, joined) == reference(source, joined)
    assert ours(PARTS, messages, continue_final_message=True).endswith("[a][b {{ x }}")


def test_the_callers_messages_are_left_alone():
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}], "name": None},
        {"role": "assistant", "content": "b", "tool_calls": [call("{}")]},
    ]
    before = repr(messages)
    ChatTemplate(PARTS, TOKENS).render(messages, continue_final_message=True)
    assert repr(messages) == before


def test_named_templates_are_chosen_by_tools():
    template = ChatTemplate({"default": "plain", "tool_use": "tools"}, {})
    assert template.render([USER]) == "plain"
    assert template.render([USER], tools=TOOLS) == "tools"
    with pytest.raises(InvalidRequest, match="rag"):
        ChatTemplate({"rag": "x"}, {}).render([USER])


def test_a_model_without_template_says_so(directory):
    template = ChatTemplate.from_tokenizer(Tokenizer.from_directory(directory))
    assert not template.exists
    with pytest.raises(
        InvalidRequest, match="no chat template comes with this model; use /v1/completions"
    ) as error:
        template.render([USER])
    assert (error.value.slug, error.value.param) == ("invalid_value", "messages")


def test_the_templates_own_refusal_is_the_message_in_one_line():
    with pytest.raises(InvalidRequest) as error:
        ChatTemplate(MISTRAL, TOKENS).render([AGAIN, AGAIN])
    assert error.value.message == "Invalid request: Roles must alternate user/assistant, user first"
    assert (error.value.slug, error.value.param) == ("invalid_value", "messages")


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content + 1 }}",
        "{{ missing.attribute }}",
        "{{ 1 / 0 }}",
        "{{ messages[7].role }}",
        "{% include 'other' %}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{% for i in range(9999) %}{% for j in range(9999) %}{{ '%099d' % j }}{% endfor %}{% endfor %}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{{ raise_exception('no ' * 10000) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
    ],
)
def test_a_failing_template_gives_one_clear_line(source):
    with pytest.raises(InvalidRequest) as error:
        ChatTemplate(source, TOKENS).render([USER])
    assert "\n" not in error.value.message
    assert len(error.value.message) < 500
    assert error.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__ }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ '{0.__class__.__init__}'.format(messages) }}",
        "{{ ('{0.__class__.__init__}' | attr('format'))(messages) }}",
        "{{ '{x.__class__}'.format_map({'x': messages}) }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ messages | map(attribute='__class__') | list }}",
        "{{ (messages | attr('__class__')) }}",
    ],
)
def test_a_template_cannot_reach_pythons_internals(source):
    variables = {
        "messages": [USER],
        "raise_exception": test_a_template_that_is_not_jinja_is_a_configuration_error,
    }
    unguarded = jinja2.Environment().from_string(source).render(variables)
    assert "<" in unguarded  # repr of something internal: the template is a real way out
    rendered = ours(source, [USER])
    assert rendered is None or "<" not in rendered


def test_a_template_that_is_not_jinja_is_a_configuration_error():
    with pytest.raises(ConfigError, match="'default', line 2"):
        ChatTemplate("fine\n{% if %}", TOKENS)


def test_template_variables_cannot_replace_the_messages():
    with pytest.raises(InvalidRequest, match="'messages'") as error:
        ChatTemplate(CHATML, TOKENS).render([USER], messages=[])
    assert error.value.param == "chat_template_kwargs"


def test_template_variables_are_data_and_may_replace_special_tokens(reference):
    kwargs = {"bos_token": "{{ 1 + 1 }}", "self": 1, "range": 5}
    expected = reference(MISTRAL, [AGAIN], bos_token="{{ 1 + 1 }}")
    assert ours(MISTRAL, [AGAIN], **kwargs) == expected
    assert expected.startswith("{{ 1 + 1 }}")


def test_deeply_nested_tools_are_refused():
    nested: dict = {}
    for _ in range(20_000):
        nested = {"a": nested}
    with pytest.raises(InvalidRequest):
        ChatTemplate(CHATML, TOKENS).render([USER], tools=[nested])
    while nested:  # freeing it in one go would recurse as deep
        nested = nested["a"]


@pytest.mark.parametrize(
    ("source", "messages"),
    [
        (CHATML, []),
        ("{{ messages[0].role }}", [ASSISTANT]),  # the final message is not shown at all
        (PARTS, [{"role": "assistant", "content": []}]),
    ],
)
def test_a_final_message_that_cannot_be_continued_is_refused(source, messages):
    with pytest.raises(InvalidRequest):
        ChatTemplate(source, TOKENS).render(messages, continue_final_message=True)


# --- what templates insist on around calls

CALLS = [
    {"role": "user", "content": "x"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": call_id, "type": "function", "function": {"name": "f", "arguments": "{}"}}
            for call_id in ("call_0123456789", "abcdefghi")
        ],
    },
    {"role": "tool", "content": "y", "tool_call_id": "call_0123456789"},
    {"role": "tool", "content": "z", "tool_call_id": "abcdefghi"},
]


def test_ids_are_made_short_for_a_template_that_refuses_long_ones():
    source = (
        "{% for m in messages %}"
        "{% for c in m.tool_calls or [] %}{% if c.id | length != 9 %}{{ raise_exception('nine') }}{% endif %}"
        "{{ c.id }};{% endfor %}{% if m.role == 'tool' %}{{ m.tool_call_id }};{% endif %}{% endfor %}"
    )
    first, second, third, fourth, _ = ChatTemplate(source, {}).render(CALLS).split(";")
    assert len(first) == 9 and first.isalnum()
    assert (third, second, fourth) == (first, "abcdefghi", "abcdefghi")
    lenient = source.replace("!= 9", "> 99")
    assert ChatTemplate(lenient, {}).render(CALLS).startswith("call_0123456789;")


def test_content_is_null_for_a_template_that_shows_calls_only_then():
    source = (
        "{% for m in messages %}{% if m.role == 'assistant' and m.content is none %}"
        "{% for c in m.tool_calls %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    assert ChatTemplate(source, {}).render(CALLS) == "xf{}f{}yz"
    said = [CALLS[0], {**CALLS[1], "content": "said"}]
    assert ChatTemplate(source, {}).render(said) == "xsaid"


def test_a_template_shows_tools_or_not():
    shows = "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{{ messages[0].content }}"
    assert ChatTemplate(shows, {}).shows_tools
    assert not ChatTemplate("{{ messages[0].content }}", {}).shows_tools
    assert not ChatTemplate("{{ raise_exception('no') }}", {}).shows_tools
    assert not ChatTemplate(None, {}).shows_tools


def test_a_template_may_need_descriptions_of_tools():
    """That of gpt-oss puts them together with text, whether there is one or not."""
    needs = "{% for t in tools %}// {{ '' + t.function.description }}: {{ t.function.name }}{% endfor %}"
    assert ChatTemplate(needs, {}).needs_descriptions
    assert not ChatTemplate(needs.replace("'' + ", ""), {}).needs_descriptions
    assert not ChatTemplate("{{ messages[0].content }}", {}).needs_descriptions
