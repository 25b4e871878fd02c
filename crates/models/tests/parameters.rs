//! Names, places and values of parameters: what is trained is saved as it was stored.

mod common;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;

use burn::module::ParamId;
use burn::tensor::Device;
use common::{Reference, fixtures, largest_difference, tensor, values};
use oxiformers_hub::ModelFiles;
use oxiformers_hub::checkpoint::{Checkpoint, DType};
use oxiformers_models::nn::parameters::{self, Values};
use oxiformers_models::nn::{CacheKind, LoadOptions, LogitsFor, Parameter, Parameters};
use oxiformers_models::registry::Kind;
use oxiformers_models::save::save_pretrained;
use oxiformers_models::{
    AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification,
    CausalLM,
};

fn training(parameters: Parameters) -> (Arc<Parameters>, LoadOptions) {
    let parameters = Arc::new(parameters);
    let options = LoadOptions {
        device: Device::flex().autodiff(),
        parameters: Some(parameters.clone()),
        ..LoadOptions::default()
    };
    (parameters, options)
}

fn ids(parameters: &[Parameter]) -> HashSet<ParamId> {
    parameters.iter().map(|parameter| parameter.id).collect()
}

fn read(values: &Values) -> HashMap<ParamId, Vec<f32>> {
    let floats = |tensor: &burn::tensor::Tensor<1>| tensor.clone().into_data().try_to_vec().expect("f32");
    values.iter().map(|(id, tensor)| (*id, floats(tensor))).collect()
}

/// The tensors of a checkpoint as floats, but for those that are none.
fn stored(files: &ModelFiles) -> BTreeMap<String, (Vec<usize>, Vec<f32>)> {
    let checkpoint = Checkpoint::open(files).expect("checkpoint");
    let tensor = |name: &str| {
        let view = checkpoint.tensor(name).expect("tensor");
        Some((
            view.shape.clone(),
            oxiformers_models::nn::quant::to_f32(&view).ok()?,
        ))
    };
    let names: Vec<String> = checkpoint.tensors().map(|info| info.name.clone()).collect();
    names
        .into_iter()
        .filter_map(|name| Some((name.clone(), tensor(&name)?)))
        .collect()
}

fn check_tensors(name: &str, parameters: &Parameters, values: &Values, files: &ModelFiles, base: &str) {
    let values = read(values);
    let ours = parameters.stored(|parameter| values.get(&parameter.id).map(Vec::as_slice));
    let ours = ours.unwrap_or_else(|error| panic!("{name}: {error}"));
    let theirs = stored(files);
    for (tensor, value) in &ours {
        let short = tensor.strip_prefix(&format!("{base}.")).unwrap_or(tensor);
        let same = [tensor.as_str(), short].iter().find_map(|name| theirs.get(*name));
        let Some(same) = same else {
            panic!(
                "{name}: `{tensor}` is none of the checkpoint's: {:?}",
                theirs.keys()
            );
        };
        assert!(same == value, "{name}: `{tensor}`");
    }
    // What is not trained is kept, or is one of those that nothing is made of.
    let frozen = parameters.frozen();
    let known = |name: &String| {
        let long = format!("{base}.{name}");
        [name, &long]
            .iter()
            .any(|name| ours.contains_key(*name) || frozen.contains_key(*name))
    };
    let missing: Vec<_> = theirs.keys().filter(|name| !known(name)).collect();
    let tied = [
        "lm_head.weight",
        "embed_out.weight",
        "embed_tokens.weight",
        "shared.weight",
        "decoder.weight",
    ];
    let computed = ["m2m_100", "marian", "pegasus"]
        .iter()
        .any(|model| name.starts_with(model));
    let dropped = |name: &str| {
        tied.iter().any(|end| name.ends_with(end))
            || name.ends_with("inv_freq")
            || name.ends_with("attn.bias")
            || name.ends_with("masked_bias")
            || name.ends_with(".version")
            || name.ends_with("EncDecAttention.relative_attention_bias.weight")
            // Sinusoids are computed.
            || (computed && name.ends_with("embed_positions.weight"))
    };
    let missing: Vec<_> = missing.into_iter().filter(|name| !dropped(name)).collect();
    assert!(missing.is_empty(), "{name}: {missing:?}");
}

#[test]
fn decoders_are_saved_as_they_were_stored_and_every_parameter_learns() {
    for dir in fixtures("") {
        let name = dir.file_name().expect("name").to_string_lossy().into_owned();
        let quantized = name.contains("mxfp4") || name.contains("-fp8") || name.contains("-nf4");
        let files = ModelFiles::from_dir(&dir).expect("fixture");
        let (parameters, options) = training(Parameters::all());
        let model = AutoModelForCausalLM::from_files(&files, &options).expect("model");
        if model.config.quantization.is_some() || quantized {
            continue;
        }
        let all = parameters.trainable();
        let (ids, base) = (ids(&all), model.config.architecture.base());
        check_tensors(
            &name,
            &parameters,
            &parameters::values(&model.decoder, &ids),
            &files,
            base,
        );

        // Every parameter has a gradient, and the model is the same after its values were taken and put back.
        let reference = Reference::open(&dir);
        let input = reference.ids("input_ids");
        let seq = input[0].len();
        let forward = |decoder: &oxiformers_models::registry::AnyDecoder| {
            let mut cache = decoder.new_cache(CacheKind::Dynamic, vec![0; input.len()]);
            decoder.forward(tensor(&input, 0..seq), &mut cache, LogitsFor::All)
        };
        let logits = forward(&model.decoder);
        let before = values(logits.clone().inner());
        let gradients = logits.powi_scalar(2).sum().backward();
        let (decoder, taken, grads) = parameters::take(model.decoder, &ids, Some(gradients));
        assert_eq!(taken.len(), all.len(), "{name}");
        let without: Vec<_> = all
            .iter()
            .filter(|p| !grads.contains_key(&p.id))
            .map(|p| &p.name)
            .collect();
        let is_expert = |name: &&String| name.contains("experts");
        assert!(
            without.iter().all(is_expert),
            "{name}: no gradient of {without:?}"
        );
        let decoder = parameters::put(decoder, &all, &taken, true);
        let logits = forward(&decoder);
        assert_eq!(values(logits.clone().inner()), before, "{name}");
        assert!(logits.is_tracked());
    }
}

#[test]
fn encoders_and_encoder_decoders_are_saved_as_they_were_stored() {
    for dir in fixtures("seq2seq") {
        let name = dir.file_name().expect("name").to_string_lossy().into_owned();
        let files = ModelFiles::from_dir(&dir).expect("fixture");
        let (parameters, options) = training(Parameters::all());
        let model = AutoModelForSeq2SeqLM::from_files(&files, &options).expect("model");
        let values = parameters::values(&model.model, &ids(&parameters.trainable()));
        check_tensors(
            &name,
            &parameters,
            &values,
            &files,
            model.config.architecture.base(),
        );
    }
    for dir in fixtures("encoders") {
        let name = dir.file_name().expect("name").to_string_lossy().into_owned();
        let files = ModelFiles::from_dir(&dir).expect("fixture");
        let (parameters, options) = training(Parameters::all());
        let Ok(model) = AutoModel::from_files(&files, &options) else {
            continue;
        };
        let trainable = parameters.trainable();
        let values = parameters::values(&model.encoder, &ids(&trainable));
        let values = read(&values);
        let checkpoint = stored(&files);
        for parameter in trainable.iter().filter(|p| values.contains_key(&p.id)) {
            // A base model's names are without its prefix, and old checkpoints call the numbers of a norm otherwise.
            let tensor = parameter.slot.tensor.as_str();
            let short = tensor.split_once('.').map_or(tensor, |(_, short)| short);
            let old = |name: &str| {
                name.replace("Norm.weight", "Norm.gamma")
                    .replace("Norm.bias", "Norm.beta")
            };
            let names = [tensor.to_string(), short.to_string(), old(tensor), old(short)];
            let (_, expected) = names.iter().find_map(|name| checkpoint.get(name)).expect(tensor);
            assert!(*expected == values[&parameter.id], "{name}: {}", parameter.name);
        }
        assert!(!trainable.is_empty());
    }
}

#[test]
fn fresh_models_have_the_names_and_shapes_of_checkpoints() {
    for dir in fixtures("") {
        let name = dir.file_name().expect("name").to_string_lossy().into_owned();
        let files = ModelFiles::from_dir(&dir).expect("fixture");
        let config = AutoConfig::from_files(&files).expect("config");
        assert_eq!(config.architecture.kind(), Kind::Decoder);
        // Experts are stored in one of two forms.
        if config.quantization.is_some()
            || stored(&files)
                .keys()
                .any(|name| name.contains("experts.gate_up_proj"))
        {
            continue;
        }
        let (parameters, options) = training(Parameters::all());
        let model = AutoModelForCausalLM::from_config(config, &options).expect("model");
        let values = read(&parameters::values(&model.decoder, &ids(&parameters.trainable())));
        let ours = parameters
            .stored(|p| values.get(&p.id).map(Vec::as_slice))
            .expect("stored");
        let theirs = stored(&files);
        for (tensor, (shape, _)) in &ours {
            let Some((expected, _)) = theirs.get(tensor) else {
                continue;
            };
            assert_eq!(shape, expected, "{name}: {tensor}");
        }
        let known = ours.keys().filter(|tensor| theirs.contains_key(*tensor)).count();
        assert!(
            known * 10 > ours.len() * 9 || name.contains("released"),
            "{name}: {:?} {:?}",
            ours.keys(),
            theirs.keys()
        );
    }
}

#[test]
fn a_saved_model_answers_as_before() {
    let folder = tempfile::tempdir().expect("folder");
    for name in ["gpt2", "llama", "falcon"] {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/fixtures")
            .join(name);
        let files = ModelFiles::from_dir(&dir).expect("fixture");
        // Only a part is trained: the rest is saved as it was.
        let (parameters, options) = training(Parameters::only(|name| {
            name.contains("norm") || name.contains("ln_")
        }));
        let model = AutoModelForCausalLM::from_files(&files, &options).expect("model");
        let trainable = parameters.trainable();
        assert!(
            !trainable.is_empty() && trainable.iter().all(|p| p.shape.len() == 1),
            "{name}"
        );
        let (trained, all) = parameters.count();
        assert!(trained < all / 10, "{name}: {trained} of {all}");
        let values_now = read(&parameters::values(&model.decoder, &ids(&trainable)));
        let target = folder.path().join(name);
        let value = |p: &Parameter| values_now.get(&p.id).map(Vec::as_slice);
        save_pretrained(
            &target,
            &model.config.json,
            Some(&files),
            &parameters,
            DType::F32,
            value,
        )
        .expect("saved");
        let saved = ModelFiles::from_dir(&target).expect("saved");
        let again = AutoModelForCausalLM::from_files(&saved, &LoadOptions::default()).expect("saved");
        let first = AutoModelForCausalLM::from_files(&files, &LoadOptions::default()).expect("fixture");
        let input = Reference::open(&dir).ids("input_ids");
        let logits = |model: &AutoModelForCausalLM| {
            let mut cache = model.new_cache(CacheKind::Dynamic, vec![0; input.len()]);
            values(model.forward(tensor(&input, 0..input[0].len()), &mut cache, LogitsFor::All))
        };
        assert_eq!(
            largest_difference(&logits(&again), &logits(&first)),
            0.0,
            "{name}"
        );
    }
}

#[test]
fn heads_that_a_checkpoint_lacks_are_initialized_if_so_told() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/encoders/bert");
    let files = ModelFiles::from_dir(&dir).expect("fixture");
    let labels = ["a", "b", "c"].map(str::to_string);
    let config = AutoConfig::from_files(&files).expect("config");
    let config = config
        .for_task("ForSequenceClassification", Some(&labels), None)
        .expect("config");
    assert_eq!(config.json["architectures"][0], "BertForSequenceClassification");
    let json = serde_json::to_vec(&config.json).expect("JSON");
    let weights = files.get("model.safetensors").expect("file").expect("weights");
    let files = ModelFiles::from_memory(
        "bert",
        [
            ("config.json".to_string(), json.into()),
            ("model.safetensors".to_string(), weights),
        ],
    );
    let error =
        AutoModelForSequenceClassification::from_files(&files, &LoadOptions::default()).expect_err("no head");
    assert!(error.to_string().contains("classifier"), "{error}");
    let load = |seed| {
        let (parameters, options) = training(Parameters::all());
        let options = LoadOptions {
            new_heads: true,
            seed,
            ..options
        };
        let model = AutoModelForSequenceClassification::from_files(&files, &options).expect("model");
        let all = parameters.trainable();
        let head = all
            .iter()
            .find(|p| p.name == "classifier.weight")
            .expect("classifier");
        assert_eq!(head.shape, [3, 32]);
        let of_head = HashSet::from([head.id]);
        let values = read(&parameters::values(&model.head, &of_head));
        (parameters.newly_initialized(), values[&head.id].clone())
    };
    let (new, first) = load(1);
    let new: BTreeSet<_> = new.iter().map(String::as_str).collect();
    assert!(
        new.contains("classifier.weight") && new.contains("classifier.bias"),
        "{new:?}"
    );
    assert!(!new.iter().any(|name| name.contains("encoder")), "{new:?}");
    let deviation = (first.iter().map(|x| x * x).sum::<f32>() / first.len() as f32).sqrt();
    assert!((0.01..0.03).contains(&deviation), "{deviation}");
    assert_eq!(load(1).1, first);
    assert_ne!(load(2).1, first);
}

#[test]
fn sequences_in_one_row_do_not_see_each_other() {
    for name in ["llama", "gpt2", "bloom", "gemma2", "mistral"] {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/fixtures")
            .join(name);
        let files = ModelFiles::from_dir(&dir).expect("fixture");
        let model = AutoModelForCausalLM::from_files(&files, &LoadOptions::default()).expect("model");
        let all = Reference::open(&dir).ids("input_ids");
        let (first, second) = (all[0].clone(), all[1][..5].to_vec());
        let logits = |rows: &[Vec<i64>], segments: Option<Vec<u32>>| {
            let mut cache = model.new_cache(CacheKind::Dynamic, vec![0; rows.len()]);
            if let Some(segments) = segments {
                cache.set_segments(&[segments]);
            }
            values(model.forward(tensor(rows, 0..rows[0].len()), &mut cache, LogitsFor::All))
        };
        let apart = [&first, &second]
            .map(|row| logits(std::slice::from_ref(row), None))
            .concat();
        let segments = [vec![0; first.len()], vec![1; second.len()]].concat();
        let together = logits(&[[first, second].concat()], Some(segments));
        assert!(largest_difference(&together, &apart) < 1e-4, "{name}");
    }
}
