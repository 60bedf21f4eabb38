"""One cell's questions answered by one rank's share of batches, as far as they are not answered yet."""

from collections.abc import Callable, Sequence

from delo_eval.answers.routing_use import use_file, write_use_part
from delo_eval.harness.generate import Answerer, batches
from delo_eval.harness.model import StoredRun
from delo_eval.harness.questions import Cell, Questions
from delo_eval.harness.stored import StoredAnswers
from delo_llava.engines.ranks import Ranks

#: (cell being evaluated, questions done, questions in all), of this rank.
OnProgress = Callable[[str, int, int], None]


def answer_cells(
    run: StoredRun,
    cells: Sequence[Cell],
    load: Callable[[], Answerer],
    questions: Questions,
    stored: StoredAnswers,
    ranks: Ranks,
    progress: OnProgress | None,
) -> None:
    """Answer cells one after the other, until all are or a rank was asked to leave."""
    for cell in cells:
        if ranks.leave_soon():
            break
        answer_cell(run, cell, load, questions, stored, ranks, progress)
    stored.hashes.save()


def answer_cell(
    run: StoredRun,
    cell: Cell,
    load: Callable[[], Answerer],
    questions: Questions,
    stored: StoredAnswers,
    ranks: Ranks,
    progress: OnProgress | None,
) -> None:
    """Answer what is not answered yet of this rank's share of one cell; the model is loaded if there is any.

    A batch of which any answer is lacking is decoded as a whole, since in low precision the last bits depend
    on what is decoded together; of its answers only those that were lacking are taken.
    """
    file, tokens = stored.of(cell), cell.task.max_new_tokens
    known, name = stored.known(file), f"{cell.task.name}/{cell.pattern}"
    share = batches(questions.of(cell), run.config.eval.batch_size)[ranks.rank :: ranks.world]
    keyed = [[(stored.keys.of(question, tokens), question) for question in batch] for batch in share]
    left = [batch for batch in keyed if any(key not in known for key, _ in batch)]
    total = sum(map(len, keyed))
    done = total - sum(map(len, left))
    if progress is not None:
        progress(name, done, total)
    if not left:
        return
    with file.writer(ranks.rank) as part:
        for batch in left:
            answers = load().answer([question for _, question in batch], tokens)
            lacking = [
                (key, question.record.id, answer)
                for (key, question), answer in zip(batch, answers, strict=True)
                if key not in known
            ]
            part.append(lacking)
            stored.new += len(lacking)
            done += len(batch)
            if progress is not None:
                progress(name, done, total)
            if ranks.leave_soon():
                break
    used = use_file(run.output, stored.stage, cell.pattern, cell.task.name)
    write_use_part(used, ranks.rank, run.method.routing_use(load().model))
