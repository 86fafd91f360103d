"""A host that catches an exception and goes on: the second pass of GR runs what the first pass kept, as it saw it.

transformers' real Trainer: its auto_find_batch_size begins anew with a smaller batch, and training steps that skip."""

import pytest
import torch
from transformers import Trainer

from redit_fast.integrations.transformers import GRTrainerMixin
from tests.integrations.test_transformers import GR, GRTrainer, Recording, a_model, by_hand, trained
from tests.tolerance import relative

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory")
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def same(one, other):
    return one.items == other.items and all(torch.equal(one.inputs[name], other.inputs[name]) for name in one.inputs)


class Failing(Recording):
    """Runs out of memory once, in the forward pass of the call `fails`, or late in its backward pass."""

    fails, where, calls = 0, "forward", 0

    def compute_loss(self, *args, **kwargs):
        self.calls += 1
        now = self.calls - 1 == self.fails
        if now and self.where == "forward":
            raise OUT_OF_MEMORY
        loss = super().compute_loss(*args, **kwargs)
        if now:
            self.seen.pop()
            handle = self.model.model.embed_tokens.weight.register_hook(self._fail)
            self.handles = [handle]
        return loss

    def _fail(self, gradient):
        self.handles.pop().remove()
        raise OUT_OF_MEMORY


class Anew(GRTrainerMixin, Failing):
    """Forgets what was seen when transformers begins anew."""

    def _inner_training_loop(self, batch_size=None, *args, **kwargs):
        self.seen, self.sizes = [], [*self.__dict__.get("sizes", []), batch_size]
        self.start = [p.detach().clone() for p in self.model.parameters()]
        return super()._inner_training_loop(batch_size, *args, **kwargs)


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("fails", [0, 1, 3, 5])  # in the first step's first pass twice, its second pass, the next step
def test_auto_find_batch_size_begins_both_passes_anew(tmp_path, fails, where):
    cls = type("Anew", (Anew,), {"fails": fails, "where": where})
    trainer = trained(tmp_path, cls=cls, steps=2, per_device_train_batch_size=4, gradient_accumulation_steps=2,
                      auto_find_batch_size=True, **GR)  # fmt: skip
    assert trainer.sizes == [4, 3] and [len(call.inputs["labels"]) for call in trainer.seen] == [3] * 8
    for i in (0, 1, 4, 5):
        assert same(trainer.seen[i], trainer.seen[i + 2])
    model = a_model()
    with torch.no_grad():
        for p, q in zip(model.parameters(), trainer.start):
            p.copy_(q)
    by_hand(model, [*trainer.seen[:2], *trainer.seen[4:6]], 2, 0.5, *GR.values(), divide=False)
    for p, q, before in zip(trainer.model.parameters(), model.parameters(), trainer.start):
        assert relative(p.detach() - before, q.detach() - before) < 1e-4


class Skips:
    """A training step that skips what does not fit; before or behind the mixin."""

    clear = False

    def training_step(self, model, inputs, *args):
        try:
            return super().training_step(model, inputs, *args)
        except torch.OutOfMemoryError:
            if self.clear:
                model.zero_grad()
            return torch.zeros(())


class Outer(Skips, GRTrainerMixin, Failing):
    pass


class Inner(GRTrainerMixin, Skips, Failing):
    pass


@pytest.mark.parametrize("outer", [Outer, Inner])
@pytest.mark.parametrize(
    ("fails", "where", "clear", "kept"),
    [(0, "forward", False, 1), (1, "forward", False, 1), (1, "forward", True, 0), (0, "backward", True, 1)],
)
def test_a_batch_that_is_skipped_is_in_neither_pass(tmp_path, outer, fails, where, clear, kept):
    cls = type("Skipping", (outer,), {"fails": fails, "where": where, "clear": clear})
    trainer = trained(tmp_path, cls=cls, steps=2, gradient_accumulation_steps=2, **GR)
    seen = trainer.seen[1 - kept :]  # where the first batch was cleared with the second, it has no second pass
    assert len(seen) == 2 * kept + 4 and (not kept or same(seen[0], seen[1]))
    later = seen[2 * kept :]
    assert same(later[0], later[2]) and same(later[1], later[3]) and not same(later[0], later[1])
    model = a_model()
    start = [p.detach().clone() for p in model.parameters()]
    by_hand(model, seen[:kept], 1, 0.5, *GR.values(), divide=False)
    by_hand(model, later[:2], 2, 0.5, *GR.values(), divide=False)
    for p, q, before in zip(trainer.model.parameters(), model.parameters(), start):
        assert relative(p.detach() - before, q.detach() - before) < 1e-4


@pytest.mark.parametrize("outer", [Outer, Inner])
def test_a_step_that_is_skipped_whole_changes_nothing(tmp_path, outer):
    cls = type("Skipping", (outer,), {"fails": 2})
    trainer = trained(tmp_path, cls=cls, steps=3, **GR)
    assert len(trainer.seen) == 4 and same(*trainer.seen[:2]) and same(*trainer.seen[2:])
    model = a_model()
    by_hand(model, trainer.seen[::2], 1, 0.5, *GR.values(), divide=False)
    for p, q in zip(trainer.model.parameters(), model.parameters()):
        assert torch.allclose(p, q, rtol=0, atol=1e-5)


@pytest.mark.parametrize("outer", [Outer, Inner])
@pytest.mark.parametrize("fails", [0, 1])
def test_part_of_a_gradient_is_refused(tmp_path, outer, fails):
    cls = type("Skipping", (outer,), {"fails": fails, "where": "backward"})
    with pytest.raises(RuntimeError, match="a gradient that no whole backward pass of this step left in .grad"):
        trained(tmp_path, cls=cls, steps=2, gradient_accumulation_steps=2, **GR)


def test_halves_of_a_batch_that_did_not_fit_run_in_both_passes(tmp_path):
    class Halves(Failing):
        def training_step(self, model, inputs, *args):
            try:
                return super().training_step(model, inputs, *args)
            except torch.OutOfMemoryError:
                parts = ({name: x[part] for name, x in inputs.items()} for part in (slice(1), slice(1, None)))
                return sum(super(Halves, self).training_step(model, half, *args) for half in parts)

    trainer = trained(tmp_path, cls=type("Halving", (GRTrainerMixin, Halves), {}), steps=1, **GR)
    assert [len(call.inputs["labels"]) for call in trainer.seen] == [1] * 4
    assert same(trainer.seen[0], trainer.seen[2]) and same(trainer.seen[1], trainer.seen[3])


def test_a_run_after_one_that_was_interrupted_begins_empty(tmp_path):
    class Interrupted(GRTrainer):
        interrupted = False

        def compute_loss(self, *args, **kwargs):
            if len(self.seen) == 5 and not self.interrupted:
                self.interrupted = True
                raise KeyboardInterrupt
            return super().compute_loss(*args, **kwargs)

        def train(self, **kwargs):
            try:
                return super().train(**kwargs)
            except KeyboardInterrupt:
                self.seen.clear()
                return super().train(**kwargs)

    trainer = trained(tmp_path, cls=Interrupted, steps=2, gradient_accumulation_steps=2, **GR)
    assert trainer.interrupted and len(trainer.seen) == 8
    assert all(same(trainer.seen[i], trainer.seen[i + 2]) for i in (0, 1, 4, 5))


class Nested(Recording):
    """A loss that takes its inputs apart, at every depth."""

    def _prepare_inputs(self, inputs):
        return {**super()._prepare_inputs(inputs), "extra": {"tags": [["a"], ("b", {"c": 1})]}}

    def compute_loss(self, model, inputs, *args, **kwargs):
        extra = inputs.pop("extra")
        self.__dict__.setdefault("found", []).append(repr(extra))
        extra["tags"].pop()[1].clear()
        extra["tags"][0].append("changed")
        extra.clear()
        return super().compute_loss(model, inputs, *args, **kwargs)


def test_a_loss_that_takes_its_inputs_apart_gets_them_whole_in_both_passes(tmp_path):
    trainer = trained(tmp_path, cls=type("Both", (GRTrainerMixin, Nested), {}), steps=2, **GR)
    assert trainer.found == ["{'tags': [['a'], ('b', {'c': 1})]}"] * 4 and same(*trainer.seen[:2])


def test_an_input_that_is_changed_in_place_is_refused_by_its_name(tmp_path):
    class InPlace(GRTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            inputs["labels"][:, 0] = -100
            return super().compute_loss(model, inputs, *args, **kwargs)

    model = a_model()
    with pytest.raises(RuntimeError, match=r"^inputs\['labels'\] was changed in place in the first of .* two passes"):
        trained(tmp_path, cls=InPlace, model=model, **GR)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), a_model().parameters()))


def test_a_backward_pass_without_inputs_of_its_own_is_refused(tmp_path):
    class Twice(Trainer):
        def training_step(self, model, inputs, *args):
            loss = super().training_step(model, inputs, *args)
            self.accelerator.backward(model(**inputs).loss)
            return loss

    class Both(GRTrainerMixin, Twice):
        pass

    with pytest.raises(RuntimeError, match="one _prepare_inputs before each backward pass of a step"):
        trained(tmp_path, cls=Both, **GR)
