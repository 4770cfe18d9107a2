"""What shared code relies on, asked of every method that stands on a base, and of one dropped in: each preset on a
tiny base. Methods that bring a model of their own are in test_own_models.py.

A preset may be refused, as long as it says that this version lacks it; whatever works must work as the protocol says.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deepen.methods
from deepen.backbones import tiny
from deepen.backbones.costs import PassCosts, pass_costs
from deepen.backbones.hf import Backbone
from deepen.backbones.resolve import load
from deepen.check.counted import Ran, committed_bytes, counted_flops, passes_of
from deepen.check.effort import QUICK
from deepen.check.subject import subject_of
from deepen.check.suite import CHECKS, run
from deepen.checkpoint import open_model, save_adapter
from deepen.core import registry
from deepen.core.errors import CannotTrain, CheckpointError, DeepenError
from deepen.core.method import Joining, RecursiveModel, adapted
from deepen.core.types import Batch, Progress, Prompt, Score, StepOutput
from deepen.data.batches import batch_of
from deepen.generate.loop import complete
from deepen.generate.plain import PlainDecoder
from deepen.generate.sampling import BatchSampler, SamplingConfig
from deepen.generate.scoring import score_at_once
from deepen.generate.stop import StopConfig
from deepen.generate.verify import PREFILL_WIDTH
from deepen.metrics.ledger import reading_flops
from deepen.train.optim import freeze_base, make_optimizers

DROPPED_IN = Path(__file__).parent / "dropped_in"
PRESETS = [
    *(
        (name, preset)
        for name, method in registry.discover().items()
        if method.architecture is None
        for preset in method.preset_paths()
    ),
    *((path.parents[1].name, path.stem) for path in sorted(DROPPED_IN.glob("*/presets/*.json"))),
]
METHODS = sorted({name for name, _ in PRESETS})
ADDRESS = "tiny:llama"
BASE = tiny.build("llama")
METHOD_CHECKS = ("sampling", "commits", "decoding", "exactness", "scores", "training", "adapter saving")
SAMPLED = SamplingConfig(temperature=0.9, top_k=40, top_p=0.95, seed=11)


@pytest.fixture(autouse=True)
def dropped_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepen.methods, "__path__", [*deepen.methods.__path__, str(DROPPED_IN)])


@pytest.fixture(params=PRESETS, ids="-".join)
def preset(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


def build(preset: tuple[str, str], base: nn.Module = BASE) -> Any:
    """The untrained model of a method's preset on a base of its own."""
    torch.manual_seed(0)
    method = registry.get(preset[0])
    backbone = Backbone.attach(copy.deepcopy(base))
    model = method.load_model_type().build(method.load_config(preset[1]), backbone, backbone.vocab_size)
    return model.eval()


@pytest.fixture
def untrained(preset) -> Any:
    return build(preset)


@pytest.fixture
def model(untrained) -> Any:
    """Stands for a trained one: all that the method added is noise."""
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in untrained.saved_state().values():
            tensor.copy_(torch.randn(tensor.shape, generator=source) * 0.3)
    return untrained


def unless_refused(action: Callable[[], Any]) -> Any:
    """What `action` gives; None if nothing is to be trained, or if it is refused in so many words."""
    try:
        return action()
    except CannotTrain:
        return None
    except DeepenError as refusal:
        if "this version" not in str(refusal):
            raise
        return None


def rows(*lengths: int, seed: int = 0) -> list[list[int]]:
    source = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (length,), generator=source).tolist() for length in lengths]


def own_parameters(model: Any) -> dict[str, nn.Parameter]:
    of_base = set(model.backbone.model.parameters())
    return {name: parameter for name, parameter in model.named_parameters() if parameter not in of_base}


def scored(model: Any, *given: list[int]) -> Score | None:
    return unless_refused(lambda: model.score(batch_of(given)))


def test_a_model_meets_the_protocol(untrained):
    assert isinstance(untrained, nn.Module)
    assert isinstance(untrained, RecursiveModel)
    assert type(untrained.config).from_dict(untrained.config.to_dict()) == untrained.config


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_preset_that_generates_and_scores_and_one_that_trains(name):
    models = [build(preset) for preset in PRESETS if preset[0] == name]
    assert any(scored(model, *rows(9)) and generated(model, *rows(9)) for model in models)
    assert any(prepared_of(model, *rows(9)) is not None for model in models)


class TestSavedState:
    def test_it_holds_what_is_trained_and_nothing_of_the_base(self, model):
        of_base = {tensor.untyped_storage().data_ptr() for tensor in model.backbone.model.state_dict().values()}
        saved = {tensor.untyped_storage().data_ptr() for tensor in model.saved_state().values()}
        assert saved & of_base == set()
        assert {parameter.untyped_storage().data_ptr() for parameter in own_parameters(model).values()} <= saved

    def test_it_goes_back_bit_for_bit(self, model, preset):
        other = build(preset)
        other.load_saved_state({name: tensor.clone() for name, tensor in model.saved_state().items()})
        assert_equal_states(other.saved_state(), model.saved_state())
        expected, actual = (scored(each, *rows(40, 23)) for each in (model, other))
        assert (expected is None) == (actual is None)
        if expected is not None:
            assert torch.equal(actual.log_probs, expected.log_probs)

    @pytest.mark.parametrize("damage", ["missing", "unknown", "misshapen"])
    def test_another_state_is_refused_and_changes_nothing(self, untrained, damage):
        state = {name: torch.ones_like(tensor) for name, tensor in untrained.saved_state().items()}
        before = {name: tensor.detach().clone() for name, tensor in untrained.saved_state().items()}
        if damage == "unknown":
            bad, state["no.such.tensor"] = "no.such.tensor", torch.zeros(2)
        elif state:
            bad = sorted(state)[-1]
            if damage == "missing":
                del state[bad]
            else:
                state[bad] = torch.zeros(*state[bad].shape, 2)
        else:
            return  # nothing is added, so nothing can be missing
        with pytest.raises(CheckpointError, match=bad):
            untrained.load_saved_state(state)
        assert_equal_states(untrained.saved_state(), before)

    def test_a_saved_folder_opens_as_the_same_model(self, preset, tmp_path):
        method, loaded = registry.get(preset[0]), load(ADDRESS)
        backbone = Backbone.attach(loaded.model)
        model = method.load_model_type().build(method.load_config(preset[1]), backbone, backbone.vocab_size)
        save_adapter(tmp_path / "adapter", method=method, model=model, identity=loaded.identity)
        opened = open_model(str(tmp_path / "adapter"))
        assert opened.method == method
        assert opened.model.config == model.config
        assert_equal_states(opened.model.saved_state(), model.saved_state())


def assert_equal_states(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def test_optimizer_groups_cover_each_trainable_parameter_once(untrained):
    counts = Counter(parameter for group in untrained.optim_groups() for parameter in group["params"])
    own = own_parameters(untrained)
    assert all(counts[parameter] == 1 for parameter in own.values() if parameter.requires_grad)
    assert set(counts.values()) <= {1}
    if counts:
        make_optimizers(untrained, untrained.backbone.model, learning_rate=None)


def generated(model: Any, *prompts: list[int], sampling: Any = None) -> list[list[int]] | None:
    stop = StopConfig(max_new_tokens=10)
    results = unless_refused(lambda: complete(model, prompts, sampling=sampling, stop=stop))
    return results and [result.tokens for result in results]


class TestGeneration:
    @pytest.mark.parametrize("sampling", [SamplingConfig(), SAMPLED], ids=["greedy", "sampled"])
    def test_an_untrained_model_generates_what_its_base_does(self, untrained, sampling):
        prompts = rows(5, 1, 19)
        actual = generated(untrained, *prompts, sampling=sampling)
        if actual is not None:
            assert actual == generated(PlainDecoder(untrained.backbone), *prompts, sampling=sampling)

    def test_the_order_of_rows_and_their_company_change_nothing(self, model):
        prompts = rows(5, 1, 19)
        configs = [SamplingConfig(temperature=0.9, seed=row) for row in range(3)]
        together = generated(model, *prompts, sampling=configs)
        if together is None:
            return
        assert generated(model, *reversed(prompts), sampling=configs[::-1]) == together[::-1]
        alone = [generated(model, row, sampling=[config]) for row, config in zip(prompts, configs, strict=True)]
        assert [only for (only,) in alone] == together

    def test_dropped_rows_are_not_missed(self, model):
        prompt = Prompt(tuple(map(tuple, rows(5, 12, 7))), max_new_tokens=300)
        whole = unless_refused(lambda: gained(model, prompt, dropped=()))
        if whole is None:
            return
        without = gained(model, prompt, dropped=(1,))
        for row in (0, 2):
            common = min(len(without[row]), len(whole[row]))
            assert common >= 6 and without[row][:common] == whole[row][:common]

    def test_rows_that_come_and_go_are_what_they_are_alone(self, model):
        prompts = rows(5, 12, 7)
        alone = [generated(model, row, sampling=[SAMPLED]) for row in prompts]
        if not isinstance(model, Joining) or None in alone:
            return
        tokens = unless_refused(lambda: came_and_went(model, prompts))
        if tokens is None:
            return
        for actual, (expected,) in zip(tokens, alone, strict=True):
            common = min(len(actual), len(expected))
            assert common >= 2 and actual[:common] == expected[:common]

    def test_every_advance_gets_on(self, model):
        prompt = Prompt(((1, 2, 3), (4,)), max_new_tokens=300)
        decoding = unless_refused(lambda: model.open(prompt))
        if decoding is None:
            return
        for _ in range(4):
            advance = model.advance(decoding, BatchSampler([SAMPLED] * 2))
            assert any(row.tokens for row in advance.rows)
            assert advance.spent.passes >= 1 and advance.spent.positions >= 1


def came_and_went(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """The tokens of three rows: the second comes and goes while the first decodes, the third, in parts, stays."""
    opened = [model.open(Prompt((tuple(prompt[:5]),), max_new_tokens=10, capacity=64)) for prompt in prompts]
    for prompt, decoding in zip(prompts, opened, strict=True):
        model.feed(decoding, prompt[5:])
    decoding, alive = opened[0], [0]
    tokens: list[list[int]] = [[] for _ in prompts]
    for count in range(6):
        if count in (1, 2):
            model.join(decoding, opened[count], most_rows=3)
            alive.append(count)
        if count == 3:
            model.keep(decoding, [0, 2])
            alive.remove(1)
        if min(decoding.room(place) for place in range(len(alive))) == 0:
            break
        for row, advance in zip(alive, model.advance(decoding, BatchSampler([SAMPLED] * 3)).rows, strict=True):
            tokens[row] += advance.tokens
    return tokens


def gained(model: Any, prompt: Prompt, *, dropped: tuple[int, ...]) -> dict[int, list[int]]:
    """The tokens of each row after six advances, some rows dropped after the third."""
    decoding, sampler = model.open(prompt), BatchSampler([SAMPLED] * len(prompt.rows))
    alive = list(range(len(prompt.rows)))
    tokens: dict[int, list[int]] = {row: [] for row in alive}
    for count in range(6):
        if count == 3 and dropped:
            model.drop(decoding, dropped)
            sampler.drop(dropped)
            alive = [row for row in alive if row not in dropped]
        for row, advance in zip(alive, model.advance(decoding, sampler).rows, strict=True):
            tokens[row] += advance.tokens
    return tokens


class TestScore:
    def test_an_untrained_model_scores_as_its_base_does(self, untrained):
        batch = batch_of(rows(60, 33))
        actual = scored(untrained, *rows(60, 33))
        if actual is None:
            return
        with torch.no_grad():
            expected = score_at_once(untrained.backbone, batch)
        assert torch.equal(actual.scored, expected.scored)
        torch.testing.assert_close(actual.log_probs, expected.log_probs, rtol=0, atol=1e-5)
        assert torch.equal(actual.correct, expected.correct)

    def test_nothing_moves_before_a_changed_token(self, model):
        (row,) = rows(70)
        original = scored(model, row)
        if original is None:
            return
        for place in (1, 16, 17, 40, 69):
            changed = model.score(batch_of([[*row[:place], (row[place] + 7) % 256, *row[place + 1 :]]]))
            assert torch.equal(changed.log_probs[:, :place], original.log_probs[:, :place])
            assert torch.equal(changed.correct[:, :place], original.correct[:, :place])

    def test_the_probabilities_of_all_tokens_in_one_place_sum_to_one(self, model):
        (row,) = rows(12)
        if scored(model, row) is None:
            return
        place = 9
        others = [[*row[:place], token, *row[place + 1 :]] for token in range(model.backbone.vocab_size)]
        score = model.score(batch_of(others))
        assert float(score.log_probs[:, place].double().exp().sum()) == pytest.approx(1, abs=1e-5)
        assert int(score.correct[:, place].sum()) == 1

    def test_pads_and_company_change_nothing(self, model):
        # Noise may be sure of itself, to hundreds of nats, of which float32 keeps fewer digits than are asked for.
        model.double()
        together = scored(model, *rows(50, 1, 35))
        if together is None:
            return
        for index, row in enumerate(rows(50, 1, 35)):
            alone = model.score(batch_of([row]))
            torch.testing.assert_close(together.log_probs[index, : len(row)], alone.log_probs[0], rtol=1e-7, atol=1e-6)
            assert torch.equal(together.scored[index, : len(row)], alone.scored[0])
            assert not together.scored[index, len(row) :].any()
            assert not together.log_probs[index, len(row) :].any()


class TestTraining:
    def test_losses_are_sums_over_units_that_are_counted_beforehand(self, model):
        """However the rows of a step that was prepared as a whole are divided."""
        prepared = prepared_of(model, *rows(40, 23))
        if prepared is None:
            return
        whole, parts = trained_on(model, prepared), [prepared.rows([index]) for index in range(2)]
        assert whole.losses
        found = [trained_on(model, part) for part in parts]
        for name, term in whole.losses.items():
            assert term.total.ndim == 0 and term.total.requires_grad
            torch.testing.assert_close(term.total, sum(each.losses[name].total for each in found), rtol=1e-4, atol=1e-4)
            counts = [model.count(each)[term.unit] for each in (prepared, *parts)]
            assert counts[0] == counts[1] + counts[2]

    def test_a_step_without_anything_to_learn_has_the_same_names(self, model):
        """Ranks sum what they have by name, and one of them may have nothing."""
        prepared = prepared_of(model, *rows(40, 23))
        if prepared is None:
            return
        nothing = prepared_of(model, *rows(1))
        assert nothing is not None
        assert not any(model.count(nothing)[term.unit] for term in trained_on(model, prepared).losses.values())
        some, none = trained_on(model, prepared), trained_on(model, nothing)
        assert none.losses.keys() == some.losses.keys() and none.metrics.keys() == some.metrics.keys()
        for name, term in none.losses.items():
            assert term.unit == some.losses[name].unit and term.total == 0 and term.total.requires_grad
        assert model.step_work(nothing).flops <= model.step_work(prepared).flops

    def test_only_what_is_in_a_group_gets_a_gradient(self, model):
        prepared = prepared_of(model, *rows(40, 23))
        if prepared is None:
            return
        if own_parameters(model):
            make_optimizers(model, model.backbone.model, learning_rate=None)
        output = trained_on(model, prepared)
        torch.stack([term.total for term in output.losses.values()]).sum().backward()
        with_gradient = {parameter for parameter in model.parameters() if parameter.grad is not None}
        grouped = {parameter for group in model.optim_groups() for parameter in group["params"]}
        assert with_gradient and with_gradient <= grouped

    def test_after_a_step_without_statistics_nothing_has_moved(self, model):
        before = {name: tensor.detach().clone() for name, tensor in model.saved_state().items()}
        model.after_step({})
        assert_equal_states(model.saved_state(), before)


def prepared_of(model: Any, *given: list[int]) -> Batch | None:
    """Rows as a step prepares them; None where nothing is trained."""
    torch.manual_seed(0)
    prepared = unless_refused(lambda: model.prepare(batch_of(given), Progress(0, 10)))
    return None if prepared is None or unless_refused(lambda: model.step_work(prepared)) is None else prepared


def trained_on(model: Any, prepared: Batch) -> StepOutput:
    torch.manual_seed(0)
    return model.train_step(prepared, model.begin(prepared), Progress(0, 10))


class TestLedger:
    """What a method says that its work costs is what torch counts, and what it says that it holds is held."""

    def test_an_advance_costs_what_is_told(self, model):
        """Passes, positions, applications of layers and FLOPs, of one row: blocks are accounted for pass by pass."""
        backbone, costs = model.backbone, adapted_costs(model)
        for decoding, sampler in openings(model):
            for _ in range(4):
                with passes_of(backbone) as passes:
                    result = []
                    counted = counted_flops(lambda: result.append(model.advance(decoding, sampler)))  # noqa: B023
                spent = result[0].spent
                positions = sum(sum(ran.widths) for ran in passes)
                assert (spent.passes, spent.positions) == (len(passes), positions)
                assert spent.layer_applications >= positions * backbone.num_layers
                told = sum(each(ran, model) - each(ran, costs) for ran in passes)
                of_base = sum(ran.flops_computed(backbone, costs) for ran in passes)
                assert counted == of_base + told + spent.added_flops

    def test_a_prompt_costs_what_is_told(self, model):
        backbone, costs = model.backbone, adapted_costs(model)
        prompt = Prompt(tuple(map(tuple, rows(300))), max_new_tokens=8)
        with passes_of(backbone) as passes, calls_of_own_modules(model) as calls:
            counted = counted_flops(lambda: unless_refused(lambda: model.open(prompt)))
        if passes:
            of_base = sum(ran.flops_computed(backbone, costs) for ran in passes)
            by_pass = sum(model.flops(num_positions=r.widths[0], context=r.contexts[0], num_logits=1) for r in passes)
            own = by_pass - sum(ran.flops_told(costs) for ran in passes)
            # A method may leave its own modules out where nothing reads what comes of them.
            assert counted == of_base + (own if calls else 0)
            assert reading_flops(model.flops, num_tokens=299, width=PREFILL_WIDTH) == by_pass

    def test_a_training_step_costs_what_is_told(self, model):
        """In one of our passes, or in the base's own forward; a base beside what is trained is frozen."""
        backbone, own = model.backbone, own_parameters(model)
        batch, progress = prepared_of(model, *rows(12, 12)), Progress(0, 10)
        if batch is None:
            return
        if own:
            freeze_base(model, backbone.model)
        # What a model drafts in a step is counted as long as it may be.
        backbone.model.generation_config.eos_token_id = None
        work = model.step_work(batch)

        def step() -> None:
            output = model.train_step(batch, model.begin(batch), progress)
            torch.stack([term.total for term in output.losses.values()]).sum().backward()

        with passes_of(backbone) as passes:
            counted = counted_flops(step)
        if passes:
            # What passes compute in blocks and then hide; no gradient goes there, as what is below is frozen.
            costs = adapted_costs(model)
            hidden = sum(ran.flops_computed(backbone, costs) - ran.flops_told(costs) for ran in passes)
        else:
            hidden = hidden_above_diagonal(model, 12)
        assert counted - hidden == work.flops
        # Two products backward for each one forward where all is trained, fewer where weights are frozen.
        assert (work.backward_flops < 2 * work.forward_flops) == bool(own)

    @pytest.mark.parametrize("name", ["llama", "kimi_linear"])
    def test_a_row_holds_what_is_told(self, preset, name):
        """Of committed tokens and of what is carried; scratch of a pass, and room for more tokens, are not told."""
        model = build(preset, tiny.build(name))
        for decoding, sampler in openings(model):
            for _ in range(3):
                model.advance(decoding, sampler)
                carried = [value for value in vars(decoding).values() if isinstance(value, Mapping)]
                held = sum(tensor.nbytes for each in carried for tensor in each.values())
                held += committed_bytes(decoding.cache)
                assert held == model.state_bytes(context=decoding.cache.lengths[0])

    def test_costs_grow_with_what_is_read(self, untrained):
        assert untrained.flops(num_positions=2, context=10) > untrained.flops(num_positions=1, context=10) > 0
        assert untrained.flops(num_positions=1, context=90) > untrained.flops(num_positions=1, context=10)
        assert untrained.flops(num_positions=4, context=0, num_logits=1) < untrained.flops(num_positions=4, context=0)
        assert untrained.state_bytes(context=90) > untrained.state_bytes(context=10) > 0


def adapted_costs(model: Any) -> PassCosts:
    """Of the base, as the model's own passes find it."""
    with adapted(model):
        return pass_costs(model.backbone)


@contextmanager
def calls_of_own_modules(model: Any) -> Iterator[list[nn.Module]]:
    """In the block, which modules with weights of the method's own are called, but for those that stand in the base."""
    of_base = set(model.backbone.model.modules())
    calls: list[nn.Module] = []
    handles = [
        module.register_forward_hook(lambda called, *_: calls.append(called))
        for module in model.modules()
        if module not in of_base and list(module.parameters(recurse=False))
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def hidden_above_diagonal(model: Any, width: int) -> int:
    """Attention over all pairs of two rows' tokens computes those that it hides, too, with their gradients.

    A pair costs what the work of a step grows by from token to token, more than it grew before.
    """
    prepared = [prepared_of(model, *rows(length, length)) for length in (width - 1, width, width + 1)]
    work = [model.step_work(batch) for batch in prepared]
    before, after = (other.flops - one.flops for one, other in pairwise(work))
    return width * (width - 1) // 2 * (after - before)


def each(ran: Ran, costed: Any) -> int:
    """What `costed` tells of a pass of one row."""
    return costed.flops(num_positions=ran.widths[0], context=ran.contexts[0])


def openings(model: Any) -> list[tuple[Any, BatchSampler]]:
    """Decodings of one row each, of a text and of one that repeats itself; none where decoding is refused."""
    texts = [rows(20)[0], [*rows(6)[0] * 4]]
    opened = [unless_refused(lambda: model.open(Prompt((tuple(text),), max_new_tokens=200))) for text in texts]  # noqa: B023
    return [(decoding, BatchSampler([SAMPLED])) for decoding in opened if decoding is not None]


def checked_presets() -> Iterator[Any]:
    """Every preset on two bases; in each run the last preset of each method on one, the others in the slow profile."""
    last = dict(PRESETS)
    for base in ("llama", "kimi_linear"):
        for name, preset in PRESETS:
            marks = () if base == "llama" and last[name] == preset else pytest.mark.slow
            yield pytest.param((name, preset), base, marks=marks, id=f"{name}-{preset}-{base}")


@pytest.mark.parametrize(("chosen", "base"), list(checked_presets()))
def test_checks_of_methods_are_green(chosen, base):
    model = build(chosen, tiny.build(base))
    # What the base itself is held to is tested elsewhere.
    report = run(subject_of(model), QUICK, checks=[check for check in CHECKS if check.name in METHOD_CHECKS])
    assert report.passed, str(report)
    assert {"commits", "decoding"} <= {finding.check for finding in report.findings if finding.verdict == "passed"}
    exactness = next(finding for finding in report.findings if finding.check == "exactness")
    assert (exactness.verdict == "passed") == model.promises_base
