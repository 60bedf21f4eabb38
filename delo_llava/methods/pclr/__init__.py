"""`pclr`: one pool of low-rank directions with keys, compressed when it is full and then learned into again.

Source: PCLR (ICLR 2026); specification: newer methods, section 3. Rank i is a pair a_i, b_i in every adapted
linear with two keys; R ranks with the best score q_l·κ_l + w·q_v·κ_v act on a sample: y = W₀x + s·Σ_{i∈top}
b_i (a_i·x) + s·(R/S)·B_share A_share x. A task first makes room where the pool is full: every skip-th rank
is dropped and the others learn, over a share of the steps, to do what the whole pool did for an earlier task
drawn by its loss (answers' KL, on the running task's data); then it trains R new ranks, or R/2 beside the
best R/2 old ones. A sample whose nearest task is the newest chooses among all ranks, any other among the
older.

needs_task: no (a task is chosen per sample); encoders: none; mergeable: no (each sample has its own ranks);
per task: nothing is added, the pool has at most `pool`·R ranks and S shared ones.
Simplified: the query of the image is the mean of the frozen projector's output, not CLIP's class token; the
query of the words is their mean over context and instruction. Keys are not trained: in the paper all keys of
a task start equal, get no gradient from the answers and chase the queries by their cosine, whose optimum is
the unit mean of the queries; so they are that, and one pool of keys serves all layers, where the paper's
layers would all hold the same. Frozen ranks keep their bits; their gradient is taken out before clipping.
Not reproduced: ranks chosen by a sum over the batch; a KL over prompt and padding; two losses in two backward
passes; a rank schedule typed into scripts; keys from an unreleased file.
"""

from delo_llava.methods.pclr.method import Pclr

METHOD = Pclr
