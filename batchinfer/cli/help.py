r"""Help pages of the command line. `\\b` keeps the line breaks of a paragraph."""

from __future__ import annotations

EXIT_CODES = """\b
Exit codes:
   0  done
   1  verify found a difference
  10  more row errors than errors.max allows; without it, every row failed
  33  stopped by a signal with work left: run the same command again
  64  a wrong option or argument
  65  input with invalid content
  66  input or output that does not exist
  69  a model that cannot be loaded
  70  a bug in batchinfer: please report it with its traceback
  73  the output belongs to another job, or has other files in it
  75  storage, spool disk or engine failed: run the same command again
  77  access denied
  78  a mistake in the job file
Only 33 and 75 are worth retrying."""

OVERVIEW = """Run LLM inference over the rows of Parquet or JSONL files; every row gets exactly one result.

\b
  batchinfer plan job.yaml          show what would run: files, rows, tokens; loads no weights
  batchinfer run job.yaml           run it; the same command resumes after a stop
  batchinfer show OUTPUT            show a few rows of input and output
  batchinfer verify OUTPUT          audit the output against the input
  batchinfer serve MODEL            serve an OpenAI-compatible endpoint, or run a command with one
  batchinfer bench --help           measure the engine on this machine

OUTPUT is the job's output.path, or the job file itself."""

RUN = """Run a job, or resume it.

The job is validated before the model is loaded. Results are committed chunk by chunk below output.path; after a stop or
a crash the same command resumes and repeats nothing that was committed. On SIGTERM, SIGINT or SIGUSR1 it saves finished
rows and exits with code 33 within 8 seconds; on a second signal it exits at once.

--rehearse runs any job without its model: the answers are fake (see `fake` in the job file), everything else is real.
Results go to <output.path>-rehearsal; the real output is not touched. A tokenizer that the job names, or the model's if
it is on local disk, is used; otherwise each byte is a token.

\b
  batchinfer run jobs/quickstart.yaml
  batchinfer run job.yaml --set sampling.temperature=0.7 --set output.path=s3://bucket/out
  batchinfer run job.yaml --shard 0/8        the first of 8 workers; array jobs are detected
  batchinfer run job.yaml --rehearse --limit 1000
  batchinfer --log-level debug run job.yaml"""

RETRY = """Rerun the rows of a finished output that failed with a retryable error (engine, deadline).

The new results replace the old ones atomically; all other rows stay unchanged. Use the same job file, --set, --limit
and --rehearse as for run. The same command resumes an interrupted retry.

\b
  batchinfer retry job.yaml
  batchinfer retry job.yaml --shard 0/8"""

PLAN = """Show what a job would do; loads no weights and writes nothing.

Counts files, rows and chunks, and measures a sample of rows with the job's templates and tokenizer: prompt lengths,
rows that exceed the context, repeated prompts, shared prefixes, rows that would fail. Shows the output's location, and
whether it has results that the job would resume, or that belong to another job (exit code 73).

\b
  batchinfer plan jobs/quickstart.yaml
  batchinfer plan job.yaml --sample 10000"""

STATUS = """Show the progress of a job, from its output alone.

Counts committed chunks, rows, tokens and errors by kind. Works while the job runs, from any machine with access to the
output; workers are not contacted.

\b
  batchinfer status output/quickstart
  batchinfer status s3://bucket/out --set storage.endpoint=http://127.0.0.1:8333
  batchinfer status job.yaml --shards 8      also the share of each of 8 workers"""

VERIFY = """Audit an output against its input; exit code 1 if anything differs.

Reads every part and the whole input, and checks that each row has exactly one result beside unchanged input columns,
that sizes, hashes and totals match the commit records, and that these match manifest.json and _SUCCESS. Each difference
is one line on stdout with file and row. Given the job file, it reads the input from the paths in it.

\b
  batchinfer verify output/quickstart
  batchinfer verify job.yaml"""

SHOW = """Show a few rows of an output beside their input.

\b
  batchinfer show output/quickstart
  batchinfer show job.yaml --errors          only rows that failed
  batchinfer show output/quickstart --row 17 the row at position 17 (from 0) of its input file"""

SERVE = """Serve a model over HTTP with OpenAI-compatible routes.

\b
  batchinfer serve MODEL --port 8000
  batchinfer serve MODEL --idle-timeout 600 --max-lifetime 7200
  batchinfer serve MODEL --set engine.max_num_seqs=64 --set sampling.temperature=0
  batchinfer serve MODEL -- lm_eval --model local-completions --tasks gsm8k \\
      --model_args model={model},base_url={base_url}/completions

With a command, it starts the endpoint, waits until it is healthy, runs the command with OPENAI_BASE_URL and
OPENAI_API_KEY set, stops, and exits with the command's exit code. On SIGTERM or SIGINT it refuses new requests and
finishes running ones, for at most 8 seconds; on a second signal it exits at once. Without --api-key everybody who can
connect to HOST may use it."""

BENCH = """Measure the engine and compare it with the machine's limit.

Every command that measures first prints the machine with its GEMM rate and memory bandwidth, on the threads in use.
--json writes all results to a file."""

BENCH_THROUGHPUT = """Measure tokens per second, from prompts to text.

Prompts are random token ids, those of --workload, or the first rows of a job with its templates and sampling; nothing
is written to the job's output. Each run starts with an empty prefix cache. The limit is the time of the linear layers
alone: in each step the longer of their operations at the measured GEMM rate and one read of their weights at the
measured bandwidth.

\b
  batchinfer bench throughput MODEL --input-tokens 64-256 --output-tokens 64 --requests 256
  batchinfer bench throughput MODEL --shared-prefix 100 --repeat 3 --json throughput.json
  batchinfer bench throughput MODEL --workload requests.jsonl --set engine.max_num_seqs=64
  batchinfer bench throughput jobs/quickstart.yaml --requests 64"""

BENCH_LATENCY = """Measure time to first token and time per output token, by batch size.

The number of running requests is fixed: a finished request is replaced at once. Reading and tokenizing prompts is not
measured. The time per token is the mean of each request, a gap the time between two tokens. The limit is the time of
the linear layers alone, in a step with one prompt and in a step with one token of each request.

\b
  batchinfer bench latency MODEL --batch 1,8,32 --input-tokens 128 --output-tokens 64"""

BENCH_HOST = """Measure the milliseconds per step spent outside the model, on one core.

Loads no model: tokens are fake, and the runner's decoder computes nothing. Parts of a step: queue (add requests, remove
finished ones), schedule, build (the model's inputs), sample (bookkeeping), update (append tokens). Stop checks are the
additional time for a stop string in each request. Growth is relative to the row before: 1 is linear in sequences.

A second table is of a pretend device that computes meanwhile, for a time given by the number of sequences. Gap: from a
step's end on the device to the next launch. With depth 1 a step is launched before the results of the one before are
known, and host work overlaps. Edited rows have penalties: their sampling waits for the tokens before.

\b
  batchinfer bench host --sequences 256,1024"""

BENCH_KERNELS = """Measure each op and compare it with the limits of bandwidth and GEMM rate.

The limit of an op is the longer of two times: its unavoidable bytes at the measured bandwidth, and its operations at
the measured GEMM rate. The bandwidth is measured by reading the same amount of data, from the cache that holds it.
Every op runs with all available backends, in turns with each other and with that reading; linear layers have one. Loads
no weights.

\b
  batchinfer bench kernels
  batchinfer bench kernels MODEL --threads 1 --json kernels.json"""


BENCH_ROOFLINE = """Compute the least time that a GPU's bandwidth and rates allow for a workload, op by op.

Reads the model's configuration only, and needs no GPU: the engine's scheduler plans every step, and in each step an op
takes the longer of its bytes over the bandwidth and its operations over the rate of dense products. Host work and
launches are not in it, speculation neither. A KV cache that the memory does not hold limits the batch.

\b
GPUs: a100-pcie, a100-sxm, h100-pcie, h100-sxm, h200, b200, l40s, l4, rtx-4090, mi300x. cpu is this machine: it is
measured, and the roofline holds for the workload of `bench throughput` with the same options.

\b
  batchinfer bench roofline qwen3-0.6b --gpu h200 --requests 256 --input-tokens 100-1024 --output-tokens 100-1024
  batchinfer bench roofline llama-3-8b --gpu l4 --dtype float8 --kv-cache-dtype float8
  batchinfer bench roofline ./config.json --gpu h100-sxm --max-num-seqs 512 --json roofline.json
  batchinfer bench roofline MODEL --gpu cpu --requests 64"""
