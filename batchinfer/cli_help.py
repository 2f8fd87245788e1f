"""The help pages of the command line. `\\b` keeps the lines of a paragraph as they are."""

from __future__ import annotations

EXIT_CODES = """\b
Exit codes:
   0  done
   1  verify found a difference
  10  done, but more row errors than errors.max allows
  33  stopped by a signal with work left: run the same command again
  64  a wrong option or argument
  65  input with wrong content
  66  input or output that is not there
  69  a model that cannot be used
  70  a bug in batchinfer: please report it with its traceback
  73  the output belongs to another job
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
goes, and whether one is there that the job would continue, or that belongs to another job (exit code 73).

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
one line on stdout with file and row.

\b
  batchinfer verify output/quickstart
  batchinfer verify job.yaml"""

SHOW = """Show a few rows of an output beside their input.

\b
  batchinfer show output/quickstart
  batchinfer show job.yaml --errors          only rows that ended as errors
  batchinfer show output/quickstart --row 17 the row at position 17 (from 0) of its input file"""
