"""What can be wrong with a sequence's data: every kind of fault by its code, and one fault found."""

from dataclasses import dataclass

from delo_llava.data.faults import READING

#: Code -> what it means. These make the check fail.
FAULTS: dict[str, str] = {
    **READING,
    "image_missing": "an image file is not there",
    "image_undecodable": "an image cannot be decoded to its last row, or not be shown faithfully",
    "image_too_large": "an image has more pixels or bytes than are accepted (decompression bomb)",
    "id_repeated": "an id was used before in the same file",
    "record_repeated": "a record of an earlier entry has the same image, context, instruction and answer",
    "overlap_path": "a test or validation record shows an image file that training shows",
    "overlap_content": "a test or validation record shows an image that training shows under another name",
    "label_empty": "nothing of a training record's answer would be trained but special tokens",
    "placeholder_in_text": "the text holds the model's image placeholder",
    "prompt_refused": "the collator cannot make a prompt of a record for another reason",
    "too_long": "image, template and room for an answer alone exceed data.max_length",
    "answer_form": "the reference has not the form that the task's scorer needs",
    "extra_missing": "a key that the task's scorer needs is absent",
}

#: Code -> what it means. These are told, and the check passes.
NOTES: dict[str, str] = {
    "link_outside": "an image is reached through a symbolic link that leaves the image folder",
    "image_dark": "an image is nearly black, as one of 10 or 12 bits that are stored in 16",
    "turns_apart": "records are later turns of a conversation, each shown without the turns before it",
    "turn_repeated": "turns of a conversation say what an earlier turn of the same one says",
    "text_cut": "contexts, instructions or trained answers do not fit data.max_length and are cut",
    "answer_long": "answers (of a question: all that its scorer takes) are longer than the task's "
    "max_new_tokens, so that none generated can equal them",
    "annotations_changed": "an annotation file is not the one that was checked before",
    "shared_across_tasks": "images tested in one task are trained on in another",
    "side_absent": "an optional side file is not there",
    "side_unmatched": "entries that find no row in a side file of their task",
    "accepted": "faults of a kind that --allow names",
}


@dataclass(frozen=True, slots=True)
class Fault:
    """One problem, named by file and record.

    Attributes:
        code: a key of `FAULTS` or `NOTES`.
        file: the annotation file.
        entry: number of the entry in it, from 0; None when the file as a whole is meant.
        record: the record's (or the entry's) id.
    """

    code: str
    task: str
    split: str
    file: str
    entry: int | None
    record: str | None
    message: str

    def __str__(self) -> str:
        """One line."""
        where = self.file if self.entry is None else f"{self.file}, entry {self.entry}"
        who = f" (id {self.record})" if self.record is not None else ""
        return f"{self.code}: {where}{who}: {self.message}"
