//! Every encoder and each of its heads against Transformers, on tiny checkpoints with random weights.
//!
//! `fixtures/make_encoders.py` made the checkpoints and the reference.

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::tensor::Tensor;
use oxiformers_hub::checkpoint::TensorView;
use oxiformers_models::nn::{EncoderInputs, LoadOptions};
use oxiformers_models::tasks::{
    DocumentQuestionAnswering, MaskedLM, MultipleChoice, NextSentencePrediction, PreTraining,
    QuestionAnswering, SequenceClassification, SpanLogits, TaskType, TokenClassification,
};
use oxiformers_models::{AutoModel, AutoModelFor, AutoModelForTableQuestionAnswering, Error, Task};

use common::encoders::{batches, model, tensors, with_head};
use common::{Reference, TOLERANCE, fixtures, largest_difference};

fn fixture(name: &str) -> PathBuf {
    let found = fixtures("encoders").into_iter().find(|dir| dir.ends_with(name));
    found.expect("fixture")
}

fn floats<const D: usize>(x: Tensor<D>) -> Vec<f32> {
    x.into_data().try_to_vec().expect("f32")
}

/// The largest difference of values `[batch, seq, ..]`, rows of padding left out.
fn of_tokens(ours: &[f32], expected: &[f32], inputs: &EncoderInputs) -> f32 {
    let [batch, seq] = inputs.dims();
    assert_eq!(ours.len(), expected.len());
    let width = ours.len() / (batch * seq);
    let real = inputs.tokens.iter().enumerate().flat_map(|(row, tokens)| {
        let tokens = tokens.clone();
        tokens.map(move |token| (row * seq + token) * width)
    });
    real.map(|at| largest_difference(&ours[at..at + width], &expected[at..at + width]))
        .fold(0.0, f32::max)
}

/// The largest difference of what is said of whole texts. Some architectures leave to chance what padding sees, and so
/// what their heads say of a text that begins with padding where they read its first token.
fn of_texts(ours: &[f32], expected: &[f32], inputs: &EncoderInputs, dir: &Path) -> f32 {
    let name = dir.file_name().expect("name").to_string_lossy();
    let sparse = matches!(&*name, "big_bird" | "big_bird-one" | "modernbert-released");
    let chance = sparse || name.starts_with("deberta-v2") || name.starts_with("longformer");
    assert_eq!(ours.len(), expected.len());
    let width = ours.len() / inputs.tokens.len();
    let rows = (ours.chunks(width).zip(expected.chunks(width))).zip(&inputs.tokens);
    rows.filter(|(_, tokens)| tokens.start == 0 || !chance)
        .map(|((ours, expected), _)| largest_difference(ours, expected))
        .fold(0.0, f32::max)
}

/// Logits as one list, and whether they have a row for every token.
trait Flat {
    fn flat(self) -> (Vec<f32>, bool);
}

impl Flat for Tensor<2> {
    fn flat(self) -> (Vec<f32>, bool) {
        (floats(self), false)
    }
}

impl Flat for Tensor<3> {
    fn flat(self) -> (Vec<f32>, bool) {
        (floats(self), true)
    }
}

impl Flat for SpanLogits {
    fn flat(self) -> (Vec<f32>, bool) {
        let both = [self.start_logits, self.end_logits].map(|x| x.unsqueeze_dim::<3>(2));
        // What must not be an answer scores -1e6, which has no digits left for the rest.
        (floats(Tensor::cat(both.to_vec(), 2).clamp_min(-1e5)), true)
    }
}

/// The largest difference of a task's logits; none where neither side knows the task.
fn compare<T: TaskType<Logits: Flat>>(
    dir: &Path,
    all: &BTreeMap<String, TensorView>,
    reference: &Reference,
    types: bool,
) -> Option<f32> {
    let task = format!("{:?}", T::TASK);
    let files = model(dir, &with_head(all, &task));
    let loaded = AutoModelFor::<T>::from_files(&files, &LoadOptions::default());
    if !reference.contains(&format!("{task}.logits")) {
        assert!(
            matches!(loaded, Err(Error::NoTask { .. })),
            "{}: {task}: {loaded:?}",
            dir.display()
        );
        return None;
    }
    let loaded = loaded.unwrap_or_else(|error| panic!("{error}"));
    let mut worst = 0f32;
    for (inputs, what) in batches(reference, types) {
        let output = loaded.forward(&inputs).expect("forward");
        let (ours, of_each_token) = output.logits.flat();
        let expected = reference.floats(&format!("{task}.logits{what}"));
        worst = worst.max(match of_each_token || T::TASK == Task::PreTraining {
            true => of_tokens(&ours, &expected, &inputs),
            false => of_texts(&ours, &expected, &inputs, dir),
        });
    }
    Some(worst)
}

fn compare_base(dir: &Path, all: &BTreeMap<String, TensorView>, reference: &Reference, types: bool) -> f32 {
    // Heads that a checkpoint has are left out.
    let files = model(dir, &with_head(all, "MaskedLM"));
    let loaded =
        AutoModel::from_files(&files, &LoadOptions::default()).unwrap_or_else(|error| panic!("{error}"));
    let mut worst = 0f32;
    for (inputs, what) in batches(reference, types) {
        let output = loaded.forward(&inputs).expect("forward");
        let expected = |name: &str| reference.floats(&format!("Base.{name}{what}"));
        let last = floats(output.last_hidden_state);
        worst = worst.max(of_tokens(&last, &expected("last_hidden_state"), &inputs));
        let hidden_states = expected("hidden_states");
        assert_eq!(hidden_states.len(), output.hidden_states.len() * last.len());
        for (ours, expected) in output
            .hidden_states
            .into_iter()
            .zip(hidden_states.chunks(last.len()))
        {
            worst = worst.max(of_tokens(&floats(ours), expected, &inputs));
        }
        let has_pooler = reference.contains(&format!("Base.pooler_output{what}"));
        assert_eq!(output.pooler_output.is_some(), has_pooler);
        if let Some(pooled) = output.pooler_output {
            let pooled = floats(pooled);
            worst = worst.max(of_texts(&pooled, &expected("pooler_output"), &inputs, dir));
        }
    }
    worst
}

#[test]
fn hidden_states_and_logits_equal_transformers() {
    let mut failures = Vec::new();
    for dir in fixtures("encoders") {
        let name = dir.file_name().expect("name").to_string_lossy().into_owned();
        if std::env::var("PARITY").is_ok_and(|only| !name.contains(&only)) {
            continue;
        }
        let all = tensors(&dir);
        let reference = Reference::open(&dir);
        let types = reference.ids("token_type_ids").iter().flatten().any(|id| *id > 0);
        let args = (dir.as_path(), &all, &reference, types);
        let of = |task: fn(&Path, &_, &_, bool) -> Option<f32>| task(args.0, args.1, args.2, args.3);
        let differences = [
            Some(compare_base(args.0, args.1, args.2, args.3)),
            of(compare::<MaskedLM>),
            of(compare::<SequenceClassification>),
            of(compare::<TokenClassification>),
            of(compare::<QuestionAnswering>),
            of(compare::<DocumentQuestionAnswering>),
            of(compare::<MultipleChoice>),
            of(compare::<NextSentencePrediction>),
            of(compare::<PreTraining>),
        ];
        let shown = differences.map(|d| d.map_or("-".to_string(), |d| format!("{d:.1e}")));
        println!("{name:<24} {}", shown.map(|d| format!("{d:>8}")).join(" "));
        if differences.iter().flatten().any(|d| *d > TOLERANCE) {
            failures.push(name);
        }
    }
    assert!(failures.is_empty(), "beyond {TOLERANCE:e}: {failures:?}");
}

#[test]
fn answers_from_tables_equal_transformers() {
    let named = |dir: &Path| {
        dir.file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with("tapas"))
    };
    let dirs: Vec<_> = fixtures("encoders")
        .into_iter()
        .filter(|dir| named(dir))
        .collect();
    assert!(!dirs.is_empty());
    for dir in dirs {
        let files = model(&dir, &with_head(&tensors(&dir), "TableQuestionAnswering"));
        let loaded = AutoModelForTableQuestionAnswering::from_files(&files, &LoadOptions::default());
        let loaded = loaded.unwrap_or_else(|error| panic!("{error}"));
        let reference = Reference::open(&dir);
        for (inputs, what) in batches(&reference, false) {
            let output = loaded.forward(&inputs).expect("forward");
            let expected = |name| reference.floats(&format!("TableQuestionAnswering.{name}{what}"));
            // What is not chosen has -10000, which has no digits left for the rest.
            let chosen = |logits: &[f32]| logits.iter().map(|x| x.max(-1000.0)).collect::<Vec<_>>();
            let (ours, theirs) = (chosen(&floats(output.logits)), chosen(&expected("logits")));
            assert!(theirs.iter().any(|x| *x > -1000.0));
            let difference = of_tokens(&ours, &theirs, &inputs);
            assert!(difference < TOLERANCE, "{}: {difference:e}", dir.display());
            let name = format!("TableQuestionAnswering.logits_aggregation{what}");
            assert_eq!(output.logits_aggregation.is_some(), reference.contains(&name));
            if let Some(ours) = output.logits_aggregation {
                let difference = largest_difference(&floats(ours), &expected("logits_aggregation"));
                assert!(difference < TOLERANCE, "{}: {difference:e}", dir.display());
            }
        }
    }
    // Other encoders have no such head.
    let dir = fixtures("encoders")
        .into_iter()
        .find(|dir| dir.ends_with("bert"))
        .expect("bert");
    let files = model(&dir, &with_head(&tensors(&dir), "MaskedLM"));
    let loaded = AutoModelForTableQuestionAnswering::from_files(&files, &LoadOptions::default());
    assert!(matches!(loaded, Err(Error::NoTask { .. })), "{loaded:?}");
}

#[test]
fn weights_are_accounted_for() {
    let dir = fixture("bert");
    let all = tensors(&dir);
    let options = LoadOptions::default();
    let only_base = with_head(&all, "nothing");

    let error =
        AutoModelFor::<MaskedLM>::from_files(&model(&dir, &only_base), &options).expect_err("no head");
    let text = error.to_string();
    assert!(matches!(error, Error::NoHead { .. }), "{text}");
    assert!(
        text.contains("MaskedLM") && text.contains("cls.predictions"),
        "{text}"
    );

    // As saved from the base model alone, without its place.
    let short = |(name, view): (&String, &TensorView)| {
        (
            name.strip_prefix("bert.").unwrap_or(name).to_string(),
            view.clone(),
        )
    };
    let bare: BTreeMap<_, _> = only_base.iter().map(short).collect();
    let loaded = AutoModel::from_files(&model(&dir, &bare), &options).expect("base");
    assert!(loaded.pooler.is_some());

    // Without a pooler there is none, and a head that needs it says so.
    let mut no_pooler = with_head(&all, "SequenceClassification");
    no_pooler.retain(|name, _| !name.contains("pooler"));
    let loaded = AutoModel::from_files(&model(&dir, &no_pooler), &options).expect("base");
    assert!(loaded.pooler.is_none());
    let error = AutoModelFor::<SequenceClassification>::from_files(&model(&dir, &no_pooler), &options);
    assert!(
        error
            .expect_err("no pooler")
            .to_string()
            .contains("bert.pooler.dense.weight")
    );

    // What belongs to the base model and is not known is left over.
    let mut more = only_base.clone();
    let any = more.values().next().expect("tensor").clone();
    more.insert("bert.encoder.layer.7.output.dense.bias".to_string(), any);
    let error = AutoModel::from_files(&model(&dir, &more), &options).expect_err("left over");
    assert!(error.to_string().contains("layer.7"), "{error}");
}

#[test]
fn inputs_that_do_not_fit_are_errors() {
    let dir = fixture("bert");
    let files = model(&dir, &with_head(&tensors(&dir), "MultipleChoice"));
    let model = AutoModelFor::<MultipleChoice>::from_files(&files, &LoadOptions::default()).expect("model");
    let forward = |inputs: EncoderInputs| {
        model
            .forward(&inputs)
            .map(drop)
            .map_err(|error| error.to_string())
    };
    let good = EncoderInputs::padded(&[vec![5, 6, 7], vec![8, 9]], 0);
    assert_eq!(forward(good.clone()), Ok(()));
    for (inputs, message) in [
        (EncoderInputs::default(), "input_ids"),
        (EncoderInputs::padded(&[vec![], vec![]], 0), "input_ids"),
        (
            EncoderInputs::padded(&[vec![96]], 0),
            "holds 96, but the model has 96",
        ),
        (EncoderInputs::padded(&[vec![u32::MAX]], 0), "input_ids"),
        (EncoderInputs::padded(&[vec![5; 33]], 0), "made for 32"),
        (
            EncoderInputs {
                input_ids: vec![vec![5], vec![5, 6]],
                tokens: vec![0..1, 0..2],
                ..Default::default()
            },
            "rows",
        ),
        (
            EncoderInputs {
                token_type_ids: vec![vec![0; 3]; 1],
                ..good.clone()
            },
            "token_type_ids",
        ),
        (
            EncoderInputs {
                token_type_ids: vec![vec![2; 3]; 2],
                ..good.clone()
            },
            "token_type_ids",
        ),
        (
            EncoderInputs {
                position_ids: vec![vec![32; 3]; 2],
                ..good.clone()
            },
            "position",
        ),
        (
            EncoderInputs {
                num_choices: 3,
                ..good
            },
            "num_choices",
        ),
    ] {
        let error = forward(inputs).expect_err(message);
        assert!(error.contains(message), "{error}");
    }
}

#[test]
fn tasks_say_which_tokens_are_global() {
    let dir = fixture("longformer");
    let files = model(&dir, &with_head(&tensors(&dir), "QuestionAnswering"));
    let model =
        AutoModelFor::<QuestionAnswering>::from_files(&files, &LoadOptions::default()).expect("model");
    let start = |inputs: &EncoderInputs| {
        model
            .forward(inputs)
            .map(|output| floats(output.logits.start_logits))
    };
    let ids = |separator: u32| vec![vec![9, 8, separator, separator, 7, 6, 5, separator]; 2];

    let inputs = EncoderInputs::padded(&ids(2), 1);
    let question = EncoderInputs {
        global_attention_mask: vec![vec![1, 1, 0, 0, 0, 0, 0, 0]; 2],
        ..inputs.clone()
    };
    let none = EncoderInputs {
        global_attention_mask: vec![vec![0; 8]; 2],
        ..inputs.clone()
    };
    let [by_itself, given, without] =
        [&inputs, &question, &none].map(|inputs| start(inputs).expect("forward"));
    assert_eq!(by_itself, given);
    assert!(largest_difference(&given, &without) > 1e-3);

    let no_separators = EncoderInputs::padded(&ids(9), 1);
    let error = start(&no_separators).expect_err("no separators").to_string();
    assert!(error.contains("global_attention_mask"), "{error}");
    let misshapen = EncoderInputs {
        global_attention_mask: vec![vec![1; 3]; 2],
        ..inputs
    };
    let error = start(&misshapen).expect_err("misshapen").to_string();
    assert!(error.contains("global_attention_mask"), "{error}");
}

#[test]
fn rotary_positions_can_be_given() {
    let dir = fixture("modernbert");
    let files = model(&dir, &with_head(&tensors(&dir), "MaskedLM"));
    let model = AutoModel::from_files(&files, &LoadOptions::default()).expect("model");
    let with = |position_ids: Vec<Vec<u32>>| {
        let inputs = EncoderInputs {
            position_ids,
            ..EncoderInputs::padded(&[vec![5, 6, 7, 8]], 0)
        };
        model
            .forward(&inputs)
            .map(|output| floats(output.last_hidden_state))
    };
    let [plain, shifted, apart] =
        [vec![], vec![vec![3, 4, 5, 6]], vec![vec![0, 1, 9, 17]]].map(|rows| with(rows).expect("forward"));
    assert!(largest_difference(&plain, &shifted) < 1e-4);
    assert!(largest_difference(&plain, &apart) > 1e-2);
    let error = with(vec![vec![0]]).expect_err("misshapen").to_string();
    assert!(error.contains("position_ids"), "{error}");
}

#[test]
fn boxes_that_do_not_fit_are_errors() {
    let dir = fixture("layoutlm");
    let files = model(&dir, &with_head(&tensors(&dir), "MaskedLM"));
    let model = AutoModel::from_files(&files, &LoadOptions::default()).expect("model");
    let with = |bbox: Vec<Vec<[u32; 4]>>| {
        let inputs = EncoderInputs {
            bbox,
            ..EncoderInputs::padded(&[vec![5, 6]], 0)
        };
        (model.forward(&inputs).map(drop)).map_err(|error| error.to_string())
    };
    assert_eq!(with(vec![]), Ok(()));
    assert_eq!(with(vec![vec![[1, 2, 3, 4], [39; 4]]]), Ok(()));
    for bbox in [
        vec![vec![[0; 4]]],
        vec![vec![[0, 0, 0, 40]; 2]],
        vec![vec![[5, 0, 4, 0]; 2]],
    ] {
        let error = with(bbox).expect_err("bbox");
        assert!(error.contains("bbox"), "{error}");
    }
}

/// Blocks of two tokens; up to 22 tokens are short.
#[test]
fn sequences_of_a_group_share_a_batch() {
    let dir = fixture("big_bird");
    let files = model(&dir, &with_head(&tensors(&dir), "Base"));
    let model = AutoModel::from_files(&files, &LoadOptions::default()).expect("model");
    let group = |length| model.config.architecture.batch_group(length);
    assert!(group(22) == group(5) && group(22) != group(23) && group(24) != group(25));
    let sequence = |length: u32| {
        (0..length)
            .map(|i| 5 + (i * 37 + length) % 80)
            .collect::<Vec<u32>>()
    };
    let states = |rows: &[Vec<u32>]| {
        let output = model.forward(&EncoderInputs::padded(rows, 0)).expect("forward");
        let [_, seq, hidden] = output.last_hidden_state.dims();
        let states = floats(output.last_hidden_state);
        let of_row =
            |(row, ids): (usize, &Vec<u32>)| states[row * seq * hidden..][..ids.len() * hidden].to_vec();
        rows.iter().enumerate().map(of_row).collect::<Vec<_>>()
    };
    for (lengths, alike) in [
        ([25, 26], true),
        ([3, 21], true),
        ([24, 27], false),
        ([20, 25], false),
    ] {
        let rows = lengths.map(sequence);
        let together = states(&rows);
        let alone = rows.map(|row| states(&[row]).concat());
        let worst = (together.iter().zip(&alone))
            .map(|(a, b)| largest_difference(a, b))
            .fold(0.0, f32::max);
        assert_eq!(worst < 1e-5, alike, "{lengths:?}: {worst:e}");
        assert_eq!(group(lengths[0] as usize) == group(lengths[1] as usize), alike);
    }
}
