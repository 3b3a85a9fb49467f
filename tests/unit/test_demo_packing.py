"""How documents become batches: what is learned, what sees what, and that nothing is lost."""

import random
from collections import Counter, deque
from itertools import islice

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from engine.demo import corpus, packing
from engine.demo.dialogue import Document
from engine.demo.optimizer import Muon, orthogonalize
from engine.demo.tokenizer import IM_END, render, train_tokenizer


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return list(islice(corpus.documents(11), 400))


@pytest.fixture(scope="module")
def tokenizer(documents: list[Document]) -> Tokenizer:
    return train_tokenizer(render(d) for d in documents)


def test_only_what_the_assistant_says_is_learned(documents: list[Document], tokenizer: Tokenizer) -> None:
    dialogues = [d for d in documents if d.text is None and not d.tools]
    for document, (ids, flags) in zip(dialogues, packing.encode(dialogues, tokenizer), strict=True):
        said = "".join(m["content"] + IM_END for m in document.messages if m["role"] == "assistant")
        assert tokenizer.decode(ids[flags].tolist(), skip_special_tokens=False) == said


def test_all_of_a_plain_text_is_learned(documents: list[Document], tokenizer: Tokenizer) -> None:
    texts = [d for d in documents if d.text is not None]
    assert all(flags.all() for _, flags in packing.encode(texts, tokenizer))


def test_of_a_dialogue_that_was_cut_off_everything_said_is_learned() -> None:
    header, end = np.array([1, 9]), 2
    for length in range(2, 9):
        ids = np.array([1, 8, 5, 2, 1, 9, 6, 7, 2])[:length]
        assert packing.target_flags(ids, header, end).tolist() == [i >= 6 for i in range(length)]


def random_documents(rng: random.Random, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    lens = [rng.randint(1, 60) for _ in range(count)]
    return [(np.full(n, i + 1), np.ones(n, bool)) for i, n in enumerate(lens)]


@pytest.mark.parametrize("seed", range(20))
def test_packing_keeps_every_document_whole_and_apart(seed: int) -> None:
    rng = random.Random(seed)
    documents = random_documents(rng, 40)
    queues = [deque(documents[:20]), deque(documents[20:])]
    batch = packing._pack(queues, 64, 6)
    left = {int(ids[0]) for queue in queues for ids, _ in queue}
    packed = {int(ids[0]): len(ids) for ids, _ in documents if int(ids[0]) not in left}
    assert Counter(batch.token_ids[batch.documents > 0].tolist()) == packed
    room = [64 - int((row > 0).sum()) for row in batch.documents]
    assert all(len(ids) > max(room) for queue in queues for ids, _ in queue), "a document would have fitted"
    mask = batch.mask()[:, 0]
    for row in range(6):
        ids = batch.token_ids[row]
        for i, j in mask[row].nonzero().tolist():
            assert j <= i and ids[i] == ids[j]
        for position, document in zip(batch.positions[row].tolist(), batch.documents[row], strict=True):
            seen = int((batch.documents[row] == document).sum())
            assert document == 0 or position < seen
    # A token is learned where something of its document comes before it.
    assert torch.equal(batch.is_target, (batch.documents > 0) & (batch.positions > 0))


def test_every_query_sees_itself_so_that_no_attention_row_is_empty() -> None:
    batch = packing._pack([deque(random_documents(random.Random(0), 3))], 64, 4)
    assert batch.mask()[:, 0].diagonal(dim1=1, dim2=2).all()


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 48, 16), (2, 16, 48)])
def test_orthogonalize_brings_singular_values_near_one_and_keeps_the_directions(shape: tuple) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalize(matrices)
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.5 and values.max() < 1.3
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(result.flatten(), (u @ v).flatten(), dim=0) > 0.95


@pytest.mark.slow
def test_muon_comes_nearer_to_the_minimum_of_a_quadratic() -> None:
    weight, goal = torch.nn.Parameter(torch.zeros(8, 8)), torch.eye(8)
    optimizer = Muon([weight], lr=0.2, momentum=0.5, weight_decay=0.0)
    for step in range(20):
        optimizer.param_groups[0]["lr"] = 0.2 * (1 - step / 20)
        loss = (weight - goal).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05 * goal.square().sum()
