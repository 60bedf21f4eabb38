"""How a model's family writes one turn: a question with picture and context, and its answer."""

from dataclasses import dataclass

from delo_llava.data.segments import SEGMENT_CONTEXT, SEGMENT_IMAGE, SEGMENT_INSTRUCTION, SEGMENT_OTHER


@dataclass(frozen=True)
class Dialogue:
    """One turn: `head text turn` or `image_head IMAGE image_tail text turn`, then `lead ANSWER end`.

    Attributes:
        head: what stands before the text where no picture is shown.
        image_head, image_tail: what stands around the picture, the former from the beginning.
        turn: from the text's end to where generation begins.
        lead: what an answer is preceded by, besides.
        end: the token that closes an answer, the last trained one.
        bos: a sequence begins with the tokenizer's BOS token.
    """

    head: str
    image_head: str
    image_tail: str
    turn: str
    lead: str
    end: str
    bos: bool

    def prompt(self, image: str | None, context: str | None, instruction: str) -> list[tuple[str, int]]:
        """The prompt up to where the answer begins: (text, segment) pieces, to be tokenised as one.

        The text is `Context: {context}`, a line break and the instruction; a missing context leaves its whole
        line out.

        Args:
            image: the family's image token, which stands for the picture; None where none is shown.
        """
        pieces = [(self.head, SEGMENT_OTHER)]
        if image is not None:
            pieces = [
                (self.image_head, SEGMENT_OTHER), (image, SEGMENT_IMAGE), (self.image_tail, SEGMENT_OTHER),
            ]  # fmt: skip
        if context is not None:
            pieces += [("Context: ", SEGMENT_OTHER), (context, SEGMENT_CONTEXT), ("\n", SEGMENT_OTHER)]
        return [*pieces, (instruction, SEGMENT_INSTRUCTION), (self.turn, SEGMENT_OTHER)]

    def answer(self, text: str) -> str:
        """What follows the prompt when the answer is known, its end token included."""
        return f"{self.lead}{text}{self.end}"


def chatml(system: str, image_head: str, image_tail: str) -> Dialogue:
    """One user turn of ChatML, after a system text that is written out, with what stands around a picture."""
    head, turn = f"{system}<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    return Dialogue(head, head + image_head, image_tail, turn, "", "<|im_end|>", bos=False)
