"""The help pages of the command line. `\\b` keeps the lines of a paragraph as they are."""

from __future__ import annotations

EXIT_CODES = """\b
Exit codes:
   0  done
   1  verify found a difference
  10  more row errors than errors.max allows; without it, every row failed
  33  stopped by a signal with work left: run the same command again
  64  a wrong option or argument
  65  input with wrong content
  66  input or output that is not there
  69  a model that cannot be used
  70  a bug in batchinfer: please report it with its traceback
  73  the output belongs to another job, or holds other files
  75  storage, spool disk or engine failed: run the same command again
  77  access denied
  78  a mistake in the job file
Retrying helps with 33 and 75, and with nothing else."""

OVERVIEW = """Run prompts out of Parquet or JSONL through a language model; every row gets exactly one result.

\b
  batchinfer plan job.yaml          what would run: files, rows, tokens; loads no weights
  batchinfer run job.yaml           run it; the same command again continues after a stop
  batchinfer show OUTPUT            a few rows of input and output
  batchinfer verify OUTPUT          audit the output against the input
  batchinfer serve MODEL            an OpenAI-style endpoint, or one around a command
  batchinfer bench --help           measure the engine on this machine

OUTPUT is the job's output.path, or the job file itself."""

RUN = """Run a job, or what is left of it.

Everything that can be wrong is looked for before the model is loaded. Results are committed chunk by chunk below
output.path; after a stop or a crash the same command continues and repeats nothing that was committed. SIGTERM, SIGINT
and SIGUSR1 save finished rows and leave with exit code 33 within 8 seconds; a second signal leaves at once.

--rehearse runs any job without its model: the answers are fake (see `fake` in the job file), all else is real. They go
to <output.path>-rehearsal; the real output is not touched. The model's tokenizer is kept where it is on local disk, and
so is one that the job names; otherwise a token is a byte.

\b
  batchinfer run jobs/quickstart.yaml
  batchinfer run job.yaml --set sampling.temperature=0.7 --set output.path=s3://bucket/out
  batchinfer run job.yaml --shard 0/8        the first of 8 workers; array jobs are recognised
  batchinfer run job.yaml --rehearse --limit 1000
  batchinfer --log-level debug run job.yaml"""

RETRY = """Run the rows of a finished output again that ended with a retryable error (engine, deadline).

Their new results replace the old ones in one step; all other rows stay as they are. Give the same job file, --set,
--limit and --rehearse as for run. An interrupted retry continues with the same command.

\b
  batchinfer retry job.yaml
  batchinfer retry job.yaml --shard 0/8"""

PLAN = """Say what a job would do; loads no weights and writes nothing.

Counts files, rows and chunks, and measures a sample of rows with the job's templates and tokenizer: prompt lengths,
rows that do not fit the context, repeated prompts, shared prefixes, rows that would be errors. Says where the output
goes, and whether one is there that the job would continue, or that is not this job's (exit code 73).

\b
  batchinfer plan jobs/quickstart.yaml
  batchinfer plan job.yaml --sample 10000"""

STATUS = """Say how far a job is, from its output alone.

Counts committed chunks, rows, tokens and errors by kind. Works while the job runs, from any machine that reaches the
output; no worker is asked.

\b
  batchinfer status output/quickstart
  batchinfer status s3://bucket/out --set storage.endpoint=http://127.0.0.1:8333
  batchinfer status job.yaml --shards 8      also the share of each of 8 workers"""

VERIFY = """Audit an output against its input; exit code 1 if anything differs.

Reads every part and the whole input: each row has exactly one output, with the input's own text and numbers beside it;
sizes, hashes and totals agree with the commit records, and these with manifest.json and _SUCCESS. Each difference is
one line on stdout with file and row. Given the job file, it looks for the input where that says.

\b
  batchinfer verify output/quickstart
  batchinfer verify job.yaml"""

SHOW = """Show a few rows of an output beside their input.

\b
  batchinfer show output/quickstart
  batchinfer show job.yaml --errors          only rows that ended as errors
  batchinfer show output/quickstart --row 17 the row at position 17 (from 0) of its input file"""

SERVE = """Answer OpenAI-style requests over HTTP with a model, for as long as somebody needs it.

\b
  batchinfer serve MODEL --port 8000
  batchinfer serve MODEL --idle-timeout 600 --max-lifetime 7200
  batchinfer serve MODEL --set engine.max_num_seqs=64 --set sampling.temperature=0
  batchinfer serve MODEL -- lm_eval --model local-completions --tasks gsm8k \\
      --model_args model={model},base_url={base_url}/completions

With a command it starts, waits until it is healthy, runs the command with OPENAI_BASE_URL and OPENAI_API_KEY set,
stops, and ends with the command's exit code. SIGTERM and SIGINT refuse new requests and let those in flight finish,
for 8 seconds at most; a second signal leaves at once. Without --api-key everybody who reaches HOST may use it."""

BENCH = """Measure the engine, each time beside the limit of the machine.

Every command prints the machine first, with its GEMM rate and memory bandwidth as measured on the threads that are
used. --json writes all figures to a file."""

BENCH_THROUGHPUT = """Tokens per second, from prompts to text.

Prompts are random token ids, those of --workload, or the first rows of a job, with its templates and sampling; nothing
is written to the job's output. Each run begins with an empty prefix cache. The limit is the time of the linear layers
alone, at the measured GEMM rate or reading their weights once a step at the measured bandwidth.

\b
  batchinfer bench throughput MODEL --input-tokens 64-256 --output-tokens 64 --requests 256
  batchinfer bench throughput MODEL --shared-prefix 100 --repeat 3 --json throughput.json
  batchinfer bench throughput MODEL --workload requests.jsonl --set engine.max_num_seqs=64
  batchinfer bench throughput jobs/quickstart.yaml --requests 64"""

BENCH_LATENCY = """Time to the first token and per token after it, by batch.

A fixed number of requests runs: one that ends is replaced at once. Tokenizing and reading of prompts are not in these
times. Per token is the mean of each request, a gap the time between two tokens. The limit is that of the linear layers
alone, in a step with one prompt and in a step with a token of each request.

\b
  batchinfer bench latency MODEL --batch 1,8,32 --input-tokens 128 --output-tokens 64"""

BENCH_HOST = """Milliseconds that a step takes outside the model, on one core.

Loads no model: fake answers, and a runner whose decoder computes nothing. Parts of a step: queue (requests added,
finished ones taken), schedule, build (the model's inputs), sample (bookkeeping), update (tokens taken in). Stop checks
are what a stop string in each request adds. Growth is relative to the row before: 1 is linear in sequences.

\b
  batchinfer bench host --sequences 256,1024"""

BENCH_KERNELS = """Each op against what bandwidth or GEMM rate allow.

The limit of an op is the longer of two times: its unavoidable bytes at the measured bandwidth, and its operations at
the measured GEMM rate. Bandwidth is that of reading as much data, in the cache that holds it. Every op runs with all
backends that are there, in turn with one another and with that reading; linear layers have one. Loads no weights.

\b
  batchinfer bench kernels
  batchinfer bench kernels MODEL --threads 1 --json kernels.json"""
