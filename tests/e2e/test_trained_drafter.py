"""The drafter that comes with deepen, on the model it was trained for: it drafts well, and changes nothing."""

from functools import cache
from pathlib import Path

import pytest
from effort import share_of_profile
from hypothesis import given
from hypothesis import strategies as st

from deepen.checkpoint import Opened, open_model
from deepen.evaluate.prompts import prompts_of
from deepen.generate.loop import complete
from deepen.generate.plain import PlainDecoder
from deepen.generate.sampling import SamplingConfig
from deepen.generate.stop import StopConfig
from deepen.methods.chunk.config import RecursiveConfig

ADAPTER = Path(__file__).parents[2] / "adapters" / "smollm2-drafter"
SOURCES = {"auto": {}, "shallow": {"draft": "shallow", "chunk_width": 6}}


@cache
def opened(source: str) -> Opened:
    return open_model(str(ADAPTER), overrides=SOURCES[source], pack=True)


prompts = st.lists(st.text(max_size=60).map(lambda text: "\n" + text), min_size=1, max_size=3)
samplings = st.one_of(
    st.just(SamplingConfig()),
    st.builds(SamplingConfig, temperature=st.floats(0.1, 2.0), top_p=st.floats(0.1, 1.0), seed=st.integers(0, 99)),
)


def test_it_is_small_and_its_configuration_is_one() -> None:
    config = RecursiveConfig.from_file(ADAPTER / "recursive_config.json")
    assert config.drafter_hidden and config.resolved_draft == "auto"
    assert (ADAPTER / "sidecar.safetensors").stat().st_size < 8_000_000


@pytest.mark.slow
@share_of_profile(20, least=10)
@given(source=st.sampled_from(sorted(SOURCES)), texts=prompts, sampling=samplings, num_tokens=st.integers(1, 24))
def test_any_prompt_is_answered_as_by_the_base(
    source: str, texts: list[str], sampling: SamplingConfig, num_tokens: int
) -> None:
    model = opened(source)
    rows = [model.tokenizer.encode(text) for text in texts]
    options = {"sampling": sampling, "stop": StopConfig(max_new_tokens=num_tokens, eos_ids=model.eos_ids)}
    plain = complete(PlainDecoder(model.backbone), rows, **options)
    exact = complete(model.decoder, rows, **options)
    assert [row.tokens for row in exact] == [row.tokens for row in plain]


@pytest.mark.slow
def test_it_saves_passes() -> None:
    """By itself: `auto` goes by the clock."""
    model = opened("shallow")
    rows = [prompt.encode(model.tokenizer) for prompt in prompts_of("chat")]
    stop = StopConfig(max_new_tokens=64, eos_ids=model.eos_ids)
    results = [complete(model.decoder, [row], stop=stop)[0] for row in rows]
    assert sum(len(result.tokens) for result in results) > 1.3 * sum(result.passes for result in results)
