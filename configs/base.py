"""Every field of a run, with its meaning. The other files state only what differs from this one.

`--config configs/8b.py:reference`, and so for every size, restores the published recipe where ours
departs from it. `configs/8b.py:v5p` (v5e, v6e) sets what a size needs on such a pod.
"""

from ml_collections import ConfigDict

from mlembed_jax.config_fields import REFERENCE

VARIANTS = {"": {}, "reference": REFERENCE}


def pod(remat: str, copies: int = 1) -> dict:
  """Returns the fields of a run on a pod.

  How many tokens are encoded at a time is chosen by the texts of the corpus (`data.micro_batch`).
  """
  return {
    "data.lengths": (1024,),  # one loop over blocks; shorter texts share sheets
    # All of the longest step, of clustering rows with 11 texts: nothing is encoded twice.
    "data.kept_tokens": 512 * 11 * 1024,
    "model.remat": remat,
    "mesh.data": copies,
  }


# What a size needs on the pod of a generation, whose shape mlembed_jax/devices/tpu.py gives; found
# with `python -m mlembed_jax.aot --sweep`.
PODS = {
  "v5e": {
    "0_6b": pod(remat="context", copies=16),
    "1_7b": pod(remat="context", copies=4),
    "4b": pod(remat="full"),
    "8b": pod(remat="full"),
  },
  "v5p": {size: pod(remat="context", copies=4) for size in ("0_6b", "1_7b", "4b", "8b")},
  "v6e": {
    "0_6b": pod(remat="context", copies=16),
    "1_7b": pod(remat="context", copies=4),
    "4b": pod(remat="full", copies=4),
    "8b": pod(remat="full", copies=4),
  },
}


def pods(size: str) -> dict[str, dict]:
  """Returns the variants of a configuration that are named after generations of TPUs."""
  return {generation: sizes[size] for generation, sizes in PODS.items()}


def task(negatives: int, inbatch: bool = False, symmetric: bool = False) -> dict:
  """Returns what the contrastive terms do with one task type."""
  return {
    "temperature": 0.05,  # cosines are divided by it
    "final_temperature": 0.05,  # reached linearly over the run; the same number: fixed
    "negatives": negatives,  # hard ones used per row and step, drawn from those stored (fewer
    #                          where fewer are)
    "inbatch": inbatch,  # positives of the other rows of the global batch are negatives too
    "symmetric": symmetric,  # in the batch: mean of query to passage and passage to query
  }


def get_config(variant: str = "") -> ConfigDict:
  """Returns the 0.6B-shaped defaults, changed by a named variant."""
  config = ConfigDict(
    {
      # The encoder: a dense Qwen3 decoder without a language-model head.
      "model": {
        "vocab": 151_936,  # rows of the token table; Qwen's tokenizer uses 151,669 of them
        "width": 1024,  # of the residual stream, and of the embedding
        "layers": 28,
        "ffn": 3072,  # inner width of the SwiGLU
        "heads": 16,  # query heads; a multiple of kv_heads
        "kv_heads": 8,
        "head_dim": 128,  # its own number: heads x head_dim need not be the width
        "rank": 512,  # of the token table U [vocab, rank] @ V [rank, width]; 0: a full table
        "rope_theta": 1e6,
        "norm_eps": 1e-6,
        # Qwen3: True and False; Qwen2: False and True; Llama: both False.
        "qk_norm": True,  # RMSNorm on every query and key head
        "qkv_bias": False,  # added to queries, keys and values
        "dtype": "bfloat16",  # of the computation; parameters are float32. bfloat16 | float32
        "attention": "auto",  # the platform's kernel | splash (TPU) | cudnn (GPU) | einsum (all)
        "remat": "full",  # computed again by backward, in growing need of memory: offload and full
        #                   (whole layers) | context (all but attention) | products | dots | none
      },
      # What is trained along each axis. () is the default set; (full,) alone switches an axis off.
      "matryoshka": {
        "dims": (),  # output dimensions; default 8, 16, 32, ... below the width, and the width
        "exits": (),  # layer counts; default 1, 2, 4, 8, 16, 24, 32, ... and all layers
        "ranks": (),  # one drawn per step, by size; default 64, 128, 256, ... and the rank
      },
      # Cross-entropies over cosines: own positive against own hard negatives, plus (inbatch) own
      # positive against the positives of the other rows of the global batch.
      "losses": {
        "retrieval": task(negatives=7, inbatch=True),
        "bitext": task(negatives=7, inbatch=True, symmetric=True),
        "clustering": task(negatives=9),
        "classification": task(negatives=1),
        # Pairs with a score in [0, 1]: higher scores shall have higher cosines (CoSENT).
        "scored_pairs": {"temperature": 0.05, "final_temperature": 0.05},
        "learn_temperature": False,  # True: one per task type, from `temperature` on
        "softmax": "separate",  # hard and in-batch negatives: two cross-entropies | joint: one
        "inbatch_negatives": False,  # True: stored negatives of other rows are candidates too
        "inbatch_passage_grad": True,  # False: passages of other rows are constants
        "mask_duplicates": True,  # identical texts are never each other's negatives
        # A candidate of another row is no negative if its cosine with the query is this much above
        # the positive's, by the deepest exit at the rank of the step (own), at full rank beside
        # self_distillation, or by as many dims of the teacher; 2: no limit.
        "false_negative_margin": 2.0,
        "false_negative_score": "own",
        # Weights of further terms; 0: off.
        "self_distillation": 0.0,  # KL to the full model's choice; not for scored pairs
        "spread_out": 0.0,  # pairs of texts as orthogonal as on an even sphere (GOR)
        "int8": 0.0,  # the contrastive terms over vectors rounded to int8
        "binary": 0.0,  # ... and to one bit per coordinate
      },
      # Learning from a teacher's final-norm states. Every exit learns from the teacher's exit at
      # the nearest fraction of depth, its d coordinates from the teacher's first d.
      "kd": {
        "teacher": "",  # workdir or exported folder of an encoder with the same tokenizer |
        #                 stored: vectors beside the data, named by the manifest | empty: none
        "exits": (),  # layer counts at which the teacher is an encoder; (): as its folder says
        "match": "depth_fraction",  # | index: by position from the deepest exit
        "space": "raw",  # mean squared error of states | unit: squared distance of unit vectors
        "weight": 1.0,  # 0: the teacher only judges, for losses.false_negative_score
      },
      "data": {
        "builder": "",  # quickstart: write text, tokenizer and dataset into WORKDIR/data first
        "dataset": "",  # folder that python -m mlembed_jax.prepare wrote; its tokenizer is used
        "train": ("*",),  # patterns over the files of the dataset
        "manifest": "",  # JSON: held-out file -> task_type, instruction, ...; "" with heldout ()
        "heldout": (),  # patterns of held-out files, evaluated before and after; () for none
        "pooled_token": "<|endoftext|>",  # ends every text; its state is the embedding
        # Which rows: file d counts as min(rows, max_rows) ** size_exponent, a language as its
        # rows in all files ** (1 / language_temperature). 1 and 1: by size.
        "max_rows": 80_000,  # per file and epoch, other ones each epoch; 0: all
        "size_exponent": 1.0,  # below 1: small files more often
        "language_temperature": 1.0,  # above 1: small languages more often, but
        "max_repeats": 4.0,  # no row more often than this per epoch (UniMax)
        "instructions": "",  # JSON: file -> instruction, in place of the manifest's; empty: those
        "query_instructions": True,  # False: none on queries, as in the first of two stages
        "document_instructions": 0.3,  # share of the documents of symmetric tasks that have it too
        "global_batch": 512,  # rows per step over all devices, all from one file
        "micro_batch": 0,  # tokens encoded at a time over all devices (GradCache): memory against
        #                    padding of the last block; 0: chosen by the compiler's account
        "kept_tokens": 0,  # of each of `lengths`, over all devices: the blocks that hold so many
        #                    tokens keep their activations, the others are encoded twice
        "lengths": (256, 1024),  # of token sheets: a text goes to the shortest that holds it; the
        #                          last one truncates
        "packing": True,  # texts share a sheet as far as they fit | False: one text per sheet
        "workers": 2,  # processes that read ahead; 0: in this process
      },
      # AdamW with decoupled weight decay on every parameter, gradients clipped by global norm.
      "optimizer": {
        "learning_rate": 1e-5,
        "min_learning_rate": 1e-7,  # a clamp from below after the first update
        "schedule": "cosine",  # to zero over the run | constant after warm-up
        "warmup_steps": 100,  # the first update has rate 0 in any case
        "beta1": 0.9,
        "beta2": 0.98,
        "eps": 1e-8,
        "weight_decay": 0.01,  # times the learning rate
        "clip_norm": 1.0,
        # Kept per parameter between updates: float32 (8 bytes) | bfloat16 (4) | factored (2: the
        # second moment by rows and columns).
        "moments": "float32",
      },
      # Devices along each axis: data copies the parameters, fsdp splits them, tensor splits heads
      # and MLP. -1 takes what is left.
      "mesh": {"data": 1, "fsdp": -1, "tensor": 1},
      "train": {
        "init_from": "",  # a folder in Hugging Face layout, or hf:ORG/NAME; empty: random weights
        "steps": 0,  # length of the run in updates, or
        "epochs": 2.0,  # in passes over the training files; one of the two is 0
        "seed": 0,  # of weights, data order, drawn negatives and drawn ranks
        "log_every": 10,  # steps per line of metrics.jsonl
        "checkpoint_every": 500,  # steps
        "keep_checkpoints": 3,  # the newest ones
      },
      "eval": {
        "every": 0,  # steps between evaluations of all slices, which also save a checkpoint; 0:
        #              before and after training alone
        "batch_size": 512,  # texts encoded at a time, over all devices
      },
      "export": {
        "name": "mlembed-0.6b",  # of the model; cuts add -d, -l and -r to it
        "at_end": False,  # also write the folder WORKDIR/export when training ends
        "dtype": "bfloat16",  # of the stored weights: bfloat16 | float32
        "max_seq_length": 8192,  # tokens a user of the folder may encode
        "max_positions": 40_960,  # max_position_embeddings of the base model
      },
    }
  )
  return apply_variant(config, VARIANTS, variant)


def apply_variant(config: ConfigDict, variants: dict[str, dict], variant: str) -> ConfigDict:
  """Returns `config` with the fields of the named variant set."""
  if variant not in variants:
    known = ", ".join(name for name in variants if name)
    raise LookupError(f"unknown variant {variant!r}; known: {known}")
  config.update_from_flattened_dict(variants[variant])
  return config
