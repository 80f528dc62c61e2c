"""The task that trains the student from which a path of a chained phase starts (see `rmdd.distill.chain`)."""

import dataclasses
from pathlib import Path

from rmdd.core.device import device_of
from rmdd.core.seeding import derive
from rmdd.distill.chain import path_start_file, write_path_start
from rmdd.distill.guard import PhaseDiverged
from rmdd.evaluate.students import Diverged, StudentSchedule, train_student
from rmdd.execution.tasks import Hooks, Interrupted
from rmdd.experts.store import Store
from rmdd.experts.train import expert_model
from rmdd.runs.items import (
    TaskItem,
    distilled_pairs,
    exclusive_folder,
    needed_after_training,
    prepared_split,
    with_local_paths,
)
from rmdd.runs.paths import training_of_path_starts


@dataclasses.dataclass(frozen=True)
class TrainPathStart:
    """Task: train a student of the first subsets from theta_0 of expert `item.number`, and write its parameters.

    The student trains on the sets that the first phases had at `item.iterations`, as the run's students train on them.
    """

    def target(self, item: TaskItem) -> Path:
        return path_start_file(item.paths.phase(len(item.iterations)), item.number, item.iterations)

    def __call__(self, item: TaskItem, hooks: Hooks) -> bool:
        item, storage = with_local_paths(item)
        run, paths, file = item.run, item.paths, self.target(item)
        device, phase = device_of(run.runtime), len(item.iterations)
        with exclusive_folder(file.parent, storage, hooks) as hooks:
            if not file.is_file():
                storage.fetch(paths.store, needed_after_training)
                storage.fetch(paths.data)
                train, size = prepared_split(item, "train"), run.data.image_size
                subsets = distilled_pairs(item, storage, size)
                model = expert_model(run.model, size, run.seed_of("experts"), item.number, train.texts.shape[1])
                model.load_trained(Store.open(paths.store).read(item.number, 0))
                model.temperature = run.student_temperature
                schedule = StudentSchedule.of(training_of_path_starts(run)).on(train.mean, train.std)
                seed = derive(run.seed_of("distill"), "path start", phase)

                def after_pass(subset: int, passes: int) -> None:
                    hooks.report({"passes": passes})
                    if hooks.should_stop():
                        raise Interrupted

                try:
                    model = model.to(device)
                    train_student(model, subsets, schedule, run.distill.loss, seed, item.number, after_pass)
                except Interrupted:
                    return False
                except Diverged as error:
                    raise PhaseDiverged(
                        f"a student from which the paths of phase {phase} should start diverged: {error}; lower "
                        "distill.lr_lr or distill.inner_lr, or set distill.path_start: theta_0"
                    ) from error
                write_path_start(file, model.trained())
        hooks.report({"done": 1})
        return True
