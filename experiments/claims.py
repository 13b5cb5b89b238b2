"""Every claim of ACE, KNE and CTP that the ledger holds, with what decides it (`rules.py`, `deciding.py`)."""

from __future__ import annotations

from dataclasses import dataclass

import rules
from deciding import Decide, ahead, beats, best, compared, curve, groups, reaches


@dataclass(frozen=True)
class Claim:
    """`source`, the paper's `words` and number, the `statistic`, the results it reads (`data`), what decides it, what the
    official release or the paper's own set-up does to it (`release`), its run file where that is not named like the data, and
    whether it compares the two models (`both`; then it is decided on the rows of both)."""

    source: str
    words: str
    statistic: str
    data: str
    decide: Decide
    release: str = ""
    file: str = ""
    both: bool = False


RELEASED = "value layers 23 to 25 are edited there (the paper: 26 to 28), and attention is written, which the paper denies"
NO_CODE = "the official release holds no code for this"
ACE_RIVALS = ("FT", "ROME", "MEMIT", "PMET")
KNE_RIVALS = ("FT", "FTL", "AdaLoRA", "ROME", "MEMIT")
MAPPING = ("['W_in']", "['W_gate']", "['W_Q']")
FFN = ("['W_in']", "['W_gate']", "['W_out']")
CLAIMS = (
    Claim("ACE, Table 1, Takeaway 1", "FFN layers of similar semantics (NN, CT, LG, CP, LS) lie close, dissimilar ones (AT, ST, CF) apart", "overlap (Jaccard) of the top layers (9 of 28), similar pairs minus all others; exact permutation p", "ace_table1", rules.takeaway_1, NO_CODE),
    Claim("ACE, Table 1", "attention's top layers are the same for all knowledge (a27, a26, a7), FFN's its own", "mean overlap of top layers between categories, attention minus FFN, jackknife over categories", "ace_table1", rules.attention_is_general, NO_CODE),
    Claim("ACE, Figure 2", "zeroing 1% important neurons costs over 90% of accuracy; 1% at random 9.47% and 8.19%", "share of right answers lost: above half in category, and more than at random and off category", "ace_figure2", rules.figure_2, NO_CODE),
    Claim("ACE, Figure 3", "value neurons accumulate one or two layers behind peaks of the query layers", "lag of the largest cross-correlation between query scores and value-neuron counts, two-hop prompts", "ace_figure3", rules.figure_3),
    Claim("ACE, Figure 3", "value neurons lie in middle to deep layers and grow few at the end", "layer with most of the 300 best, and the last layer against it", "ace_figure3", rules.late_values),
    Claim("ACE, section 4.2", "zeroing the top 100 query neurons of a peak layer costs 46.2% and 61.9%", "share of right two-hop answers lost (ten neurons of a layer's 512 and 384; 100 of GPT-J's 16,384 would be three)", "ace_suppression", rules.suppression_drop, NO_CODE),
    Claim("ACE, section 4.2", "activated value neurons in the layers after fall from (28, 16, 33) to (6, 4, 7), others by 12 in all", "share of activated value neurons lost, three layers after against all others", "ace_suppression", rules.suppression_counts, NO_CODE),
    Claim("ACE, Table 2", "Base 98.42 / 99.17", "multi-hop accuracy of the unedited model, chain of thought", "multihop", rules.base, "", "ace_table2"),
    Claim("ACE, Table 2", "ACE beats PMET by 9.44 (GPT-J) and 37.46 (Qwen3-8B) points", "difference per case, any of three questions", "multihop", rules.table_2, f"cases of several edits share one z* and are not fully reverted there; {RELEASED}", "ace_table2"),
    Claim("ACE, Table 2", "ACE is the best of all editors", "against the best of FT, ROME, MEMIT, PMET", "multihop", ahead("multihop_cot", "ACE", ACE_RIVALS), "as above", "ace_table2"),
    Claim("ACE, Table 2", "fine-tuning reaches 3.54 / 2.18", "below 10%", "multihop", rules.tuning_fails, "", "ace_table2"),
    Claim("ACE, Table 2", "from one edit to four ROME (44.5 to 5.1) and MEMIT (64 to 8) fall, ACE stays", "cases of one edit minus those of three and four, above 0 and above ACE's", "multihop", rules.by_edits, "as above", "ace_table2"),
    Claim("ACE, section 6.2", "locate-then-edit does even worse on Qwen3-8B than on GPT-J", "multi-hop accuracy of ROME, MEMIT and PMET, each", "multihop", rules.worse_on_qwen, "as above", "ace_table2", both=True),
    Claim("ACE, Table 3", "efficacy: ACE 99.8 / 99.4, PMET 81.6 / 75.6", "against the best of FT, ROME, MEMIT, PMET, argmax at each token", "single", ahead("efficacy_acc", "ACE", ACE_RIVALS), f"its prompts are not released; {RELEASED}", "ace_table3"),
    Claim("ACE, Table 3", "paraphrase: ACE 91.2 / 94.2, PMET 65.8 / 68.9", "the same", "single", ahead("paraphrase_acc", "ACE", ACE_RIVALS), "as above", "ace_table3"),
    Claim("ACE, Table 3", "specificity: ACE 79.2 / 81.8, PMET 74.6 / 64.4", "difference per case", "single", beats("specificity_acc", "ACE", "PMET"), "as above; FT (83.8, GPT-J) is ahead of both there", "ace_table3"),
    Claim("ACE, Table 4", "leaving out the three best of six query layers costs 16.51%, all three of Qwen3's 22.29%", "multi-hop accuracy (which decides; cloze prompts of the bundled world, MQuAKE's questions of a file) and efficacy without as many query layers as there (one of two of toy-gptj's, both of toy-qwen3's)", "ace_table4", rules.skipping("q"), RELEASED),
    Claim("ACE, Table 4", "leaving out the two best of three (five) value layers costs 26.87% / 40.45%", "the same, value layers: two of GPT-J's three and of Qwen3-8B's five, one of two here", "ace_table4", rules.skipping("v"), RELEASED),
    Claim("ACE, Table 4", "value layers matter more than query layers", "multi-hop accuracy without query layers minus without value layers: as many as in Table 4, and one and two of each", "ace_table4", rules.values_matter_more, RELEASED),
    Claim("ACE, section 6.4", "Qwen3-8B is more sensitive to the number of layers edited than GPT-J (Table 4)", "multi-hop accuracy lost without as many query layers as Table 4 leaves out, and as many value layers, Qwen3 minus GPT-J", "ace_table4", rules.more_sensitive, RELEASED, both=True),
    Claim("ACE, project page", "at an equal number of layers (9 and 8) ACE is ahead of ROME, MEMIT and PMET", "multi-hop accuracy at as many layers as ACE edits (4 of 12 here); ROME has one layer and is left out", "ace_bottleneck", rules.bottleneck, RELEASED),
    Claim("ACE, project page", "editors of value layers alone gain marginally from more layers", "MEMIT and PMET, from their own number of layers (the presets') to the most measured: less than ten points of multi-hop accuracy gained; a fall counts", "ace_bottleneck", rules.marginal),
    Claim("ACE, section 6.4", "GPT-J's query and value layers are the same for all domains, Qwen3's shift", "mean overlap of the best layers (3 of 28, of Qwen3-8B's 36) between categories; above 0.8: the same", "ace_figure3", rules.invariance),
    Claim("ACE, section 6.4", "GPT-J's value layers lie far above its query layers, Qwen3's next to them", "distance of the means of the best (3 of 28, of 36) layers in shares of the depth, by category: above 0.2 (GPT-J), below (Qwen3)", "ace_figure3", rules.separation),
    Claim("ACE, Appendix E", "attention's increase falls (layer 25) before FFN's (27)", "last layer above half the peak", "ace_table1", rules.attention_first),
    Claim("ACE, Appendix E", "the final layers hold little", "FFN importance of the last layer against the peak, below half", "ace_table1", rules.last_layers_low),
    Claim("ACE, Table 5", "importance rises most where semantics converge ('plays' 0.99, 'of' 0.85), not in between", "importance behind the subject and at the last token, each minus the mean of all other tokens", "ace_table5", rules.converging_tokens, NO_CODE),
    Claim("ACE, Tables 6 and 7", "query neurons are not interpretable, value neurons are", "share of the ten best whose promoted tokens hold the answer, value minus query", "ace_table67", rules.readable("value"), NO_CODE),
    Claim("ACE, Appendix D", "neurons that are both are highly interpretable", "the same, shared minus query", "ace_table67", rules.readable("shared"), NO_CODE),
    Claim("ACE, section 6.4", "27 interpretable neurons zeroed leave 3.2%, 27 important others 59.4%", "share of 1,000 draws that give the answer", "ace_neurons27", rules.neurons_27, NO_CODE),
    Claim("ours", "attribution chooses better layers than chance", "efficacy of ACE at located layers among random layers of the same number, ten draws per seed", "layers", rules.chance),
    Claim("KNE, Table 1", "KNE has the best edit success (99.02 on wiki counterfact)", "against the best of FT, FT-L, AdaLoRA, ROME, MEMIT", "single", ahead("edit_success", "KNE", KNE_RIVALS), "", "kne_table1"),
    Claim("KNE, Table 1", "KNE's portability is above ROME's and MEMIT's", "against the better of them", "single", ahead("portability", "KNE", ("ROME", "MEMIT")), "", "kne_table1"),
    Claim("KNE, Table 1", "KNE has the best locality on ZsRE (76.85)", "against the best of the five", "single", ahead("locality", "KNE", KNE_RIVALS), "third on wiki counterfact, fifth on wiki recent", "kne_table1"),
    Claim("KNE, Table 1", "KNE has the best fluency", "n-gram entropy times 100, against the best of the five", "single", ahead("fluency", "KNE", KNE_RIVALS), "", "kne_table1"),
    Claim("KNE, Table 2", "edit success is 97.75 to 99.90 on every model and dataset", "mean of single edits, at least 97%", "single", reaches("edit_success", "KNE", 0.97), "", "kne_table1"),
    Claim("KNE, Figure 2", "FFN parameters give better edit success and portability than attention's", "mean over W_in and W_out, minus that over W_Q, W_K, W_V, W_O", "kne_figure2", groups(("edit_success", "portability"), FFN)),
    Claim("KNE, section 4.3", "W_out is the best of all modules", "edit success and portability, each against the best of the others", "kne_figure2", best(("edit_success", "portability"), "['W_out']", "parameters")),
    Claim("KNE, section 4.3", "mapping layers (gate, up, queries) give better locality than the others", "mean over W_in and W_Q minus that over W_out, W_K, W_V, W_O", "kne_figure2", groups(("locality",), MAPPING)),
    Claim("KNE, section 4.3", "and better fluency", "the same, n-gram entropy times 100", "kne_figure2", groups(("fluency",), MAPPING)),
    Claim("KNE, Figure B.3", "located on a quarter of the facts: better locality than located on all", "all facts in one batch, located on a quarter of them against all", "kne_figureB3", rules.quarter(("locality",))),
    Claim("KNE, section 4.4", "edit success, portability and fluency then differ little", "the same; within 5 points (fluency: within 5% of itself)", "kne_figureB3", rules.quarter(("edit_success", "portability", "fluency"), 0.05)),
    Claim("KNE, section 4.4", "located on 200 to 300 of 800 facts edit success and portability are superior to 700 to 800", "located on a quarter of the facts against all", "kne_figureB3", rules.quarter(("edit_success", "portability"))),
    Claim("KNE, Figure B.4", "more parameters: better edit success and portability, worse locality", "smallest against largest share", "kne_figureB4", curve("share", ("edit_success", None, None, True), ("portability", None, None, True), ("locality", None, None, False))),
    Claim("KNE, Figure B.5", "larger batches: edit success and portability fall, locality rises at first", "edit success and portability from batches of 1 to 100, locality from 1 to 5", "kne_figureB5", curve("batch_size", ("edit_success", 1, 100, False), ("portability", 1, 100, False), ("locality", 1, 5, True))),
    Claim("KNE, section 4.6", "larger batches: fluency rises", "batches of 1 to 100, n-gram entropy times 100", "kne_figureB5", curve("batch_size", ("fluency", 1, 100, True))),
    Claim("CTP, Table 1", "batches of 100 on ZsRE: CTP has the best score (85.66, AlphaEdit 74.69)", "mean of efficacy, generality, locality; against the best of six", "ctp_table1", ahead("ctp_score", "CTP", ("FTL", "ROME", "MEMIT", "PRUNE", "RECT", "AlphaEdit")), "on CounterFact, which the bundled facts are like, it is the lowest there (43.00, AlphaEdit 90.54); baselines are from AlphaEdit's paper, with other metrics; CTP's learning rate of batches by hand (of 1e-3, 3e-3, 1e-2, 3e-2 the second best on 32 other facts)"),
    Claim("CTP, Table 2", "consecutive edits (3,000) on ZsRE: CTP has the best score (63.17, EMMET 48.12)", "100 edits; against the best of nine", "consecutive", ahead("ctp_score", "CTP", ("FTL", "ROME", "KN", "MEMIT", "PMET", "AlphaEdit", "LoRA", "EMMET", "RROME")), "on CounterFact with GPT-J R-ROME (49.51) and EMMET (48.13) are ahead of it there (32.62); CTP goes over each fact 12 times, its baselines once", "ctp_table2"),
    Claim("CTP, section 4.2", "consecutive edits ruin other editors, some down to 0 (MEMIT, PMET, AlphaEdit)", "100 edits; their score below a tenth", "consecutive", rules.all_fall, "3,000 edits there", "ctp_table2"),
    Claim("CTP, Figure 3", "CTP needs less time per edit than MEMIT, PMET and AlphaEdit", "seconds per fact, single edits one by one (batch_size 1), 1 CPU thread", "ctp_figure3", rules.seconds("CTP", rules.SLOWER, 1)),
    Claim("CTP, section 4.3", "FT-C takes slightly longer than CTP", "the same", "ctp_figure3", rules.seconds("CTP", ("FTL",), 1)),
    Claim("CTP, section 4.3", "KN takes longest of all", "the same", "ctp_figure3", rules.seconds("KN", ("FT", "FTL", "ROME", "RROME", *rules.SLOWER, "LoRA", "EMMET", "CTP"), -1)),
    Claim("CTP, Figure 4", "nodes of all layers contribute", "importance of T+ (norm of the gradient, not z-scored) by layer: each above a tenth of the largest", "ctp_figure4", rules.all_layers, "the code's z-scores are scaled within each layer, by which no layer can be far below another"),
    Claim("CTP, Figure 4", "middle layers contribute most, early ones more than late ones", "means over the paper's 1 to 4, 4 to 18 and 28 to 32 of 32 layers, scaled", "ctp_figure4", rules.early_over_late, "as above"),
    Claim("CTP, Figure 5", "larger T+: efficacy and generality rise", "smallest against largest", "ctp_figure5", curve("top", ("edit_success", None, None, True), ("generality", None, None, True))),
    Claim("CTP, Figure 5", "beyond 15 nodes of T+ locality declines sharply", "15 against the largest; neighbours and KnowEdit's locality, against the unedited model", "ctp_figure5", curve("top", ("ctp_locality", 15, None, False))),
    Claim("CTP, Figure 6", "a larger lambda lowers efficacy", "lambda 0.1 to 1", "ctp_figure6", curve("lam", ("edit_success", 0.1, 1.0, False)), "Adam divides lambda's scale out of step B"),
    Claim("CTP, section 4.5", "contrastive rectification raises efficacy by about 4%", "lambda 0.1 against 0, difference per case", "ctp_figure6", beats("edit_success", 0.1, 0.0, "lam"), "lambda = 0 skips step B, and with it a step of momentum"),
    Claim("CTP, section 4.5", "and leaves generality and locality stable", "the same; within 5 points", "ctp_figure6", compared(("generality", "ctp_locality"), 0.1, 0.0, "lam", 0.05), "as above"),
    Claim("CTP, section 4.5", "too large a T- lowers efficacy and generality", "one node to fifteen", "ctp_tminus", curve("bottom", ("edit_success", 1, 15, False), ("generality", 1, 15, False)), "one batch; measured twice, rounding alone moved a mean of toy-gptj by 19 points"),
)  # fmt: skip
