"""Which model may stand at which stage, told by what the model does and by who trained it, never by a method's name.

| stage | model |
|---|---|
| baseline | any; measured is its base alone, or a model that its method brings |
| after_surgery | an adapter that no run has trained |
| finetuned_vanilla | what `deepen train` made and decodes as a plain model does: an adapter, or a whole model |
| finetuned_recursive | what `deepen train` made with a method, and decodes otherwise or promises its base's output |
"""

from collections.abc import Sequence
from pathlib import Path

from deepen.backbones.hf import Backbone
from deepen.checkpoint import OWN_BASE, Opened, base_address
from deepen.core.errors import CannotScore
from deepen.core.method import Decoder
from deepen.evaluate.recording import Recorder
from deepen.evaluate.results import TrainingOfStage
from deepen.evaluate.training import LEDGER, Origin
from deepen.generate.loop import complete
from deepen.generate.stop import StopConfig

_NUM_PROBED = 8
_LONGEST_PROBE = 16


def require_standing(
    stage: str, opened: Opened, *, address: str, training: TrainingOfStage | None, origin: Origin | None
) -> None:
    """Raises `CannotScore`, with a way out, if the model at `address` can't stand at this stage.

    Whether it recurs is asked by `require_recursion`, which needs a text to continue.
    """
    if stage == "baseline":
        return
    if opened.model is None:
        _require_whole_model_fits(stage, address, origin)
    if stage == "after_surgery" and opened.backbone.own_method is not None:
        raise CannotScore(
            f"{address} is a model that the method {opened.backbone.own_method.name} brings, and nothing was grafted "
            "onto it; measure it as baseline before training, and as finetuned_recursive after"
        )
    if stage == "after_surgery" and training is not None:
        raise CannotScore(
            f"{address} was trained; measure it as finetuned_recursive, or as finetuned_vanilla if nothing recurs "
            "(stage after_surgery measures an adapter as `deepen graft` writes it, which has learned nothing)"
        )
    if stage != "after_surgery" and training is None:
        raise CannotScore(
            f"{address} has no {LEDGER}, which `deepen train` leaves beside what it has trained, so nothing tells what "
            f"its training cost; stage {stage} measures a checkpoint's folder (OUTPUT_DIR/step_N), and after_surgery "
            "an adapter that is not trained"
        )


def has_own_base(opened: Opened, *, address: str) -> bool:
    """Whether the folder `address` holds all weights of its model, so that a run may have trained every one of them.

    That is a plain model, one that its method brings, or an adapter beside the base that was trained with it.
    """
    if opened.model is None or opened.backbone.own_method is not None:
        return True
    return Path(base_address(address)) == Path(address).expanduser() / OWN_BASE


def _require_whole_model_fits(stage: str, address: str, origin: Origin | None) -> None:
    if stage == "after_surgery":
        raise CannotScore(
            f"{address} is a plain base model; stage {stage} measures an adapter folder, as `deepen graft` "
            "writes it (stage baseline measures the base)"
        )
    if stage == "finetuned_recursive":
        raise CannotScore(
            f"{address} is a plain model, which has no recursion; stage {stage} measures an adapter folder that "
            "`deepen train` made (finetuned_vanilla measures a model that was trained as a whole)"
        )
    if origin is None:
        raise CannotScore(
            f"{address} is a plain model, and nothing there tells what it was trained from; stage {stage} measures an "
            "adapter folder, or a whole model's checkpoint folder (OUTPUT_DIR/step_N) as `deepen train` wrote it, with "
            "its training/ (stage baseline measures any plain model)"
        )


def require_recursion(stage: str, opened: Opened, *, address: str, text: Sequence[int]) -> None:
    """Raises `CannotScore` if a fine-tuned adapter recurs at the stage for those that don't, or the other way round.

    `text` is any text's ids, of which a few are read.
    """
    if stage not in ("finetuned_vanilla", "finetuned_recursive") or opened.model is None:
        return
    recurs = opened.model.promises_base or not decodes_plainly(opened.model, opened.backbone, text)
    if recurs and stage == "finetuned_vanilla":
        reason = (
            "promises its base's own output"
            if opened.model.promises_base
            else "spends more, or less, than one pass of every layer on a token"
        )
        raise CannotScore(
            f"{address} is not a base that was trained further: its decoding {reason}; measure it as "
            "finetuned_recursive, and as finetuned_vanilla what was trained on the same data without recursion"
        )
    if not recurs and stage == "finetuned_recursive":
        raise CannotScore(
            f"{address} decodes as a plain model does, one pass of every layer for a token, so nothing in it recurs; "
            "measure it as finetuned_vanilla"
        )


def decodes_plainly(decoder: Decoder, backbone: Backbone, text: Sequence[int]) -> bool:
    """Whether each token costs one pass of one position through every layer of the base, and nothing more.

    The prompt says the same twice, so that what copies has something to copy.
    """
    prompt = [*text[:_LONGEST_PROBE]] * 2
    recorder = Recorder(decoder)
    complete(recorder, [prompt], stop=StopConfig(max_new_tokens=_NUM_PROBED))
    return all(
        len(advance.rows[0].tokens) == 1
        and advance.spent.passes == advance.spent.positions == 1
        and advance.spent.layer_applications == backbone.num_layers
        and advance.spent.added_flops == 0
        for advance in recorder.advances
    )
