"""Every field of a request has a row in a table of its effects, or a test of its own that shows them."""

from __future__ import annotations

import re
from pathlib import Path

from engine.server.openapi import SCHEMAS
from helpers.effects import CHAT, LARGEST
from server import test_effects_on_answers, test_effects_on_length, test_effects_on_tokens

TABLE = test_effects_on_tokens.TABLE | test_effects_on_length.TABLE | test_effects_on_answers.TABLE
ELSEWHERE = {
    "test_conformance.py::test_an_adapter_by_each_of_its_names": ["lora_path", "model"],
    "test_parameters.py::test_ways_to_say_the_same": ["messages"],
    "test_conformance.py::test_a_prompt_means_the_same_in_every_shape": ["prompt"],
    "test_parameters.py::test_the_last_turn_is_left_open_on_request": [
        *("add_generation_prompt", "continue_final_message"),
    ],
    "test_chat.py::test_the_prompt_is_the_rendered_template": ["chat_template_kwargs"],
    "test_request_reports.py::test_timings_of_a_whole_answer": ["return_timings"],
    "test_request_reports.py::test_user_is_for_the_log": ["user"],
    "test_abort.py::test_names_are_unique_among_live_requests_only": ["rid"],
    "test_abort.py::test_request_id_is_another_word_for_rid": ["request_id"],
    "test_structured_output.py::test_schemas": ["response_format", "json_schema", "guided_json"],
    "test_structured_output.py::test_a_phone_number": ["regex", "guided_regex", "structured_outputs"],
    "test_structured_output.py::test_grammars_and_choices": [
        *("ebnf", "guided_grammar", "choice", "guided_choice"),
    ],
    "test_structured_output.py::test_a_structural_tag": ["structural_tag"],
    "test_tools.py::test_calls_at_every_border_of_chunks": ["tools"],
    "test_tools.py::test_without_a_choice_tools_are_neither_shown_nor_read": ["tool_choice"],
    "test_bundled_tools.py::test_one_call_at_a_time": ["parallel_tool_calls"],
    "test_reasoning.py::test_effort_reaches_the_template": ["reasoning_effort"],
    "test_reasoning.py::test_the_text_can_be_left_whole": ["separate_reasoning"],
    "test_reasoning.py::test_thoughts_can_come_in_one_piece": ["stream_reasoning"],
    "test_reasoning.py::test_the_engine_is_told_of_thoughts_where_it_has_to_know": [
        *("thinking_budget", "thinking_token_budget"),
    ],
}


def test_the_table_is_complete() -> None:
    described = {*SCHEMAS["ChatRequest"]["properties"], *SCHEMAS["CompletionRequest"]["properties"]}
    elsewhere = [name for names in ELSEWHERE.values() for name in names]
    assert {*(name.split()[-1] for name in TABLE), *elsewhere} == described
    assert len(elsewhere) == len(set(elsewhere)) and not {*elsewhere} & {*TABLE}
    for place in ELSEWHERE:
        file, test = place.split("::")
        assert re.search(rf"^def {test}\(", (Path(__file__).parent / file).read_text(), re.MULTILINE), place


def test_the_ends_of_the_table_are_those_of_the_description() -> None:
    for name, row in TABLE.items():
        request = SCHEMAS["ChatRequest" if row.paths[0] == CHAT else "CompletionRequest"]
        wanted = request["properties"][name.split()[-1]]["anyOf"][0]
        if "minimum" in wanted and name not in ("top_k", "truncate_prompt_tokens"):
            assert row.low == wanted["minimum"], name
        if "exclusiveMinimum" in wanted:
            assert wanted["exclusiveMinimum"] < row.low < 1e-5, name
        if "maximum" in wanted and wanted["maximum"] != LARGEST:
            assert row.high == wanted["maximum"], name
        if "maxLength" in wanted:
            assert len(row.high) == wanted["maxLength"], name
        most = next((o["maxItems"] for o in (wanted, *wanted.get("anyOf", ())) if "maxItems" in o), None)
        if most is not None:
            assert len(row.high) == most, name
