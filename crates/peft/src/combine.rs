//! One adapter of several, as PEFT's `add_weighted_adapter` computes it.
//!
//! What is pruned, elected and summed are LoRA's two matrices themselves, or (`…_svd`) their products, of which the largest
//! singular values are kept. TIES is by Yadav et al. (2023), DARE by Yu et al. (2023).

use std::collections::{BTreeMap, BTreeSet};
use std::str::FromStr;

use oxiformers_hub::checkpoint::{DType, TensorView};
use oxiformers_nn::weights::to_f32;

use crate::adapter::Adapter;
use crate::config::{AdapterConfig, LoraConfig, Method, Names};
use crate::error::{Error, Result};
use crate::linalg;
use crate::random::Mt19937;

/// How adapters are put together: PEFT's `combination_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum CombinationType {
    Linear,
    Cat,
    Svd,
    Ties,
    TiesSvd,
    DareLinear,
    DareLinearSvd,
    DareTies,
    DareTiesSvd,
    MagnitudePrune,
    MagnitudePruneSvd,
}

impl CombinationType {
    /// All of them, with their names.
    pub const NAMES: [(&'static str, Self); 11] = [
        ("linear", Self::Linear),
        ("cat", Self::Cat),
        ("svd", Self::Svd),
        ("ties", Self::Ties),
        ("ties_svd", Self::TiesSvd),
        ("dare_linear", Self::DareLinear),
        ("dare_linear_svd", Self::DareLinearSvd),
        ("dare_ties", Self::DareTies),
        ("dare_ties_svd", Self::DareTiesSvd),
        ("magnitude_prune", Self::MagnitudePrune),
        ("magnitude_prune_svd", Self::MagnitudePruneSvd),
    ];

    /// What is done with tensors of the same shape.
    fn rule(self) -> Rule {
        let (prune, elect) = match self {
            Self::Linear | Self::Cat | Self::Svd => (None, false),
            Self::MagnitudePrune | Self::MagnitudePruneSvd => (Some(Prune::Magnitude), false),
            Self::Ties | Self::TiesSvd => (Some(Prune::Magnitude), true),
            Self::DareLinear | Self::DareLinearSvd => (Some(Prune::Random), false),
            Self::DareTies | Self::DareTiesSvd => (Some(Prune::Random), true),
        };
        Rule { prune, elect }
    }

    fn of_products(self) -> bool {
        matches!(
            self,
            Self::Svd | Self::TiesSvd | Self::DareLinearSvd | Self::DareTiesSvd | Self::MagnitudePruneSvd
        )
    }
}

impl FromStr for CombinationType {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let known = Self::NAMES.iter().find(|(known, _)| *known == name);
        known.map(|(_, kind)| *kind).ok_or_else(|| {
            let names = Self::NAMES.map(|(name, _)| name).join(", ");
            format!("`{name}` is no way to combine adapters; it is one of {names}")
        })
    }
}

#[derive(Debug, Clone, Copy)]
struct Rule {
    prune: Option<Prune>,
    /// Whether each place takes the sign that most have.
    elect: bool,
}

#[derive(Debug, Clone, Copy)]
enum Prune {
    Magnitude,
    Random,
}

/// How TIES finds the sign of a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MajoritySign {
    /// That of the sum.
    #[default]
    Total,
    /// That which most have.
    Frequency,
}

impl FromStr for MajoritySign {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "total" => Ok(Self::Total),
            "frequency" => Ok(Self::Frequency),
            _ => Err(format!(
                "`{name}` is no way to find a sign; it is total or frequency"
            )),
        }
    }
}

/// What `add_weighted_adapter` is told.
#[derive(Debug, Clone)]
#[allow(missing_docs)]
pub struct Combination {
    pub combination_type: CombinationType,
    /// One weight for each adapter.
    pub weights: Vec<f64>,
    /// Rank of the result where products are combined; the largest of the adapters' where it is not given.
    pub svd_rank: Option<usize>,
    /// Quantile beyond which values of the factors are clamped.
    pub svd_clamp: Option<f64>,
    /// Part of the values that pruning keeps.
    pub density: Option<f64>,
    pub majority_sign_method: MajoritySign,
}

impl Combination {
    /// With PEFT's defaults.
    pub fn new(combination_type: CombinationType, weights: Vec<f64>) -> Self {
        Self {
            combination_type,
            weights,
            svd_rank: None,
            svd_clamp: None,
            density: None,
            majority_sign_method: MajoritySign::Total,
        }
    }
}

/// What DARE keeps: for a tensor of a module, of the adapter of that number, and of that many values, which of them.
/// Values are counted in the order in which PEFT holds them.
pub type Draw<'a> = dyn FnMut(&str, usize, usize, f64) -> Vec<bool> + 'a;

/// What [`combine`] is told to draw by a seed.
pub fn draws(seed: u64) -> impl FnMut(&str, usize, usize, f64) -> Vec<bool> {
    let mut generator = Mt19937::new(seed);
    move |_, _, len, density| {
        let values = generator.uniform(len, 0.0, 1.0);
        values.into_iter().map(|x| f64::from(x) < density).collect()
    }
}

/// A module's matrices in one adapter.
struct Pair {
    adapter: usize,
    rank: usize,
    /// `[rank, inputs]`.
    a: Vec<f32>,
    inputs: usize,
    /// `[outputs, rank]`.
    b: Vec<f32>,
    outputs: usize,
    weight: f64,
    scaling: f64,
}

/// Combines adapters; `draw` is asked what DARE keeps.
///
/// # Errors
/// Where they are no LoRA adapters or do not fit together, and where an option is missing.
pub fn combine(
    adapters: &[&Adapter],
    combination: &Combination,
    draw: &mut Draw,
) -> Result<(AdapterConfig, BTreeMap<String, TensorView>)> {
    let mut kind = combination.combination_type;
    if adapters.len() == 1 {
        kind = CombinationType::Linear;
    }
    let configs = adapters
        .iter()
        .map(|adapter| lora(adapter))
        .collect::<Result<Vec<_>>>()?;
    let Some(first) = adapters.first() else {
        return refuse("there are no adapters to combine");
    };
    if combination.weights.len() != adapters.len() {
        return refuse(format!(
            "there are {} weights for {} adapters",
            combination.weights.len(),
            adapters.len()
        ));
    }
    if kind.rule().prune.is_some() {
        match combination.density {
            Some(density) if density > 0.0 => {}
            _ => return refuse("this combination needs a density above 0, such as 0.5"),
        }
    }
    let ranks: Vec<usize> = configs.iter().map(|config| largest_rank(config)).collect();
    let rank = match kind {
        CombinationType::Cat => ranks.iter().sum(),
        kind if kind.of_products() => combination
            .svd_rank
            .unwrap_or(ranks.iter().copied().max().unwrap_or(1)),
        _ if ranks.windows(2).all(|pair| pair[0] == pair[1]) => ranks[0],
        _ => {
            return refuse(format!(
                "this combination wants adapters of one rank, these have {ranks:?}"
            ));
        }
    };
    if rank == 0 {
        return refuse("a rank of 0 holds nothing");
    }
    let mut out = BTreeMap::new();
    for module in modules(adapters) {
        let pairs = pairs(adapters, &configs, &module, combination)?;
        let embedding = module.1;
        let transposed = embedding || configs[0].fan_in_fan_out;
        let (a, b) = match kind {
            CombinationType::Cat => concatenated(&pairs, rank),
            kind if kind.of_products() => {
                products(&module.0, &pairs, rank, transposed, kind, combination, draw)
            }
            kind => factors(&module.0, &pairs, kind, combination, draw).map_err(Error::Refused)?,
        };
        let (inputs, outputs) = (pairs[0].inputs, pairs[0].outputs);
        let own = a.len() / inputs.max(1);
        let endings = endings(embedding);
        out.insert(format!("{}{}", module.0, endings[0]), view(a, [own, inputs]));
        out.insert(format!("{}{}", module.0, endings[1]), view(b, [outputs, own]));
    }
    for (name, tensor) in saved(adapters)? {
        out.insert(name, tensor);
    }
    let mut config = first.config().clone();
    config.method = Method::Lora(LoraConfig {
        r: rank,
        lora_alpha: rank as f64,
        rank_pattern: BTreeMap::new(),
        alpha_pattern: BTreeMap::new(),
        // The scalings are in the matrices.
        use_rslora: false,
        targets: targets(&configs)?,
        ..configs[0].clone()
    });
    Ok((config, out))
}

fn refuse<T>(message: impl Into<String>) -> Result<T> {
    Err(Error::Refused(message.into()))
}

/// The configuration of an adapter that can be combined.
fn lora(adapter: &Adapter) -> Result<&LoraConfig> {
    let name = adapter.switch().name();
    match &adapter.config().method {
        Method::Lora(config) if config.use_dora => refuse(format!(
            "{name} is a DoRA adapter, whose magnitudes cannot be combined; merge it into its model"
        )),
        Method::Lora(config) if config.lora_bias => refuse(format!(
            "{name} has biases of its own (`lora_bias`), which cannot be combined"
        )),
        Method::Lora(config) => Ok(config),
        _ => refuse(format!(
            "{name} is a {} adapter; only LoRA adapters can be combined",
            adapter.config().peft_type()
        )),
    }
}

fn largest_rank(config: &LoraConfig) -> usize {
    config
        .rank_pattern
        .values()
        .copied()
        .chain([config.r])
        .max()
        .unwrap_or(0)
}

/// The modules of the result: those of all of them.
fn targets(configs: &[&LoraConfig]) -> Result<crate::config::Targets> {
    let mut targets = configs[0].targets.clone();
    let all: Vec<_> = configs
        .iter()
        .map(|config| config.targets.target_modules.clone())
        .collect();
    targets.target_modules = match &all[0] {
        Some(Names::List(_)) => {
            let mut names = BTreeSet::new();
            for of in &all {
                match of {
                    Some(Names::List(list)) => names.extend(list.iter().cloned()),
                    _ => return refuse("some adapters name their modules in a list, others by a pattern"),
                }
            }
            Some(Names::List(names.into_iter().collect()))
        }
        _ => {
            let mut patterns = Vec::new();
            for of in &all {
                match of {
                    Some(Names::Pattern(pattern)) => patterns.push(format!("({pattern})")),
                    _ => return refuse("some adapters name their modules in a list, others by a pattern"),
                }
            }
            Some(Names::Pattern(patterns.join("|")))
        }
    };
    Ok(targets)
}

fn endings(embedding: bool) -> [&'static str; 2] {
    if embedding {
        [".lora_embedding_A", ".lora_embedding_B"]
    } else {
        [".lora_A.weight", ".lora_B.weight"]
    }
}

/// The modules that one of them adapts, and whether they are tables.
fn modules(adapters: &[&Adapter]) -> BTreeSet<(String, bool)> {
    let names = adapters.iter().flat_map(|adapter| adapter.tensors().keys());
    let module = |name: &String| {
        [false, true].into_iter().find_map(|embedding| {
            let module = name.strip_suffix(endings(embedding)[0])?;
            Some((module.to_string(), embedding))
        })
    };
    names.filter_map(module).collect()
}

/// What the adapters have of a module.
fn pairs(
    adapters: &[&Adapter],
    configs: &[&LoraConfig],
    (module, embedding): &(String, bool),
    combination: &Combination,
) -> Result<Vec<Pair>> {
    let endings = endings(*embedding);
    let mut pairs: Vec<Pair> = Vec::new();
    for (index, (adapter, config)) in adapters.iter().zip(configs).enumerate() {
        let of = |ending: &str| adapter.tensors().get(&format!("{module}{ending}"));
        let (Some(a), Some(b)) = (of(endings[0]), of(endings[1])) else {
            continue;
        };
        let ([rank, inputs], [outputs, other]) = (
            a.shape[..].try_into().unwrap_or([0; 2]),
            b.shape[..].try_into().unwrap_or([0; 2]),
        );
        let same = pairs
            .first()
            .is_none_or(|first| first.inputs == inputs && first.outputs == outputs);
        if rank == 0 || rank != other || !same {
            return refuse(format!(
                "{}: `{module}` has matrices {:?} and {:?}, which fit neither each other nor those of other adapters",
                adapter.switch().name(),
                a.shape,
                b.shape
            ));
        }
        let read = |view: &TensorView| {
            to_f32(view)
                .map_err(|reason| Error::Refused(format!("{}: `{module}` {reason}", adapter.switch().name())))
        };
        pairs.push(Pair {
            adapter: index,
            rank,
            a: read(a)?,
            inputs,
            b: read(b)?,
            outputs,
            weight: combination.weights[index],
            scaling: config.scaling(module, rank).map_err(Error::Refused)?,
        });
    }
    Ok(pairs)
}

/// The matrices one below the other, and side by side.
fn concatenated(pairs: &[Pair], rank: usize) -> (Vec<f32>, Vec<f32>) {
    let (inputs, outputs) = (pairs[0].inputs, pairs[0].outputs);
    let mut a = Vec::with_capacity(rank * inputs);
    for pair in pairs {
        let factors = (pair.weight as f32, pair.scaling as f32);
        a.extend(pair.a.iter().map(|x| x * factors.0 * factors.1));
    }
    a.resize(rank * inputs, 0.0);
    let mut b = vec![0.0; outputs * rank];
    let mut at = 0;
    for pair in pairs {
        for row in 0..outputs {
            let from = &pair.b[row * pair.rank..][..pair.rank];
            b[row * rank + at..][..pair.rank].copy_from_slice(from);
        }
        at += pair.rank;
    }
    (a, b)
}

/// Each matrix of its own kind combined: half of a weight goes to either.
fn factors(
    module: &str,
    pairs: &[Pair],
    kind: CombinationType,
    combination: &Combination,
    draw: &mut Draw,
) -> Result<(Vec<f32>, Vec<f32>), String> {
    if pairs.iter().any(|pair| pair.rank != pairs[0].rank) {
        return Err(format!("`{module}` has another rank in each adapter"));
    }
    let halves = pairs.iter().map(|pair| {
        let weight = pair.weight * pair.scaling;
        let root = weight.abs().sqrt();
        (if weight < 0.0 { -root } else { root }, root)
    });
    let (of_a, of_b): (Vec<f64>, Vec<f64>) = halves.unzip();
    let numbers: Vec<usize> = pairs.iter().map(|pair| pair.adapter).collect();
    let mut sum = |values: Vec<Vec<f32>>, weights: &[f64]| {
        summed(
            values,
            weights,
            kind.rule(),
            combination,
            &mut |at, len, density| draw(module, numbers[at], len, density),
        )
    };
    let a = sum(pairs.iter().map(|pair| pair.a.clone()).collect(), &of_a);
    let b = sum(pairs.iter().map(|pair| pair.b.clone()).collect(), &of_b);
    Ok((a, b))
}

/// The products combined, and what of the result has the largest singular values.
fn products(
    module: &str,
    pairs: &[Pair],
    rank: usize,
    transposed: bool,
    kind: CombinationType,
    combination: &Combination,
    draw: &mut Draw,
) -> (Vec<f32>, Vec<f32>) {
    let (inputs, outputs) = (pairs[0].inputs, pairs[0].outputs);
    let products = pairs.iter().map(product).collect();
    let weights: Vec<f64> = pairs.iter().map(|pair| pair.weight).collect();
    let numbers: Vec<usize> = pairs.iter().map(|pair| pair.adapter).collect();
    let sum = summed(
        products,
        &weights,
        kind.rule(),
        combination,
        &mut |at, len, density| {
            let kept = draw(module, numbers[at], len, density);
            if !transposed {
                return kept;
            }
            let at = |place: usize| (place % inputs) * outputs + place / inputs;
            (0..len)
                .map(|place| kept.get(at(place)).copied().unwrap_or(false))
                .collect()
        },
    );
    let found = linalg::svd(&sum, [outputs, inputs], rank);
    let own = found.s.len();
    // Where the matrix has no more singular values, the rest is zeros.
    let mut b = vec![0.0f32; outputs * rank];
    for row in 0..outputs {
        for i in 0..own {
            b[row * rank + i] = (found.u[row * own + i] * found.s[i]) as f32;
        }
    }
    let mut a: Vec<f32> = found.vt.iter().map(|x| *x as f32).collect();
    a.resize(rank * inputs, 0.0);
    if let Some(part) = combination.svd_clamp {
        let most = quantile(b.iter().chain(&a).copied().collect(), part);
        a.iter_mut()
            .chain(&mut b)
            .for_each(|x| *x = x.clamp(-most.abs(), most.abs()));
    }
    (a, b)
}

/// `scaling · b · a`: `[outputs, inputs]`.
fn product(pair: &Pair) -> Vec<f32> {
    let mut out = vec![0.0f32; pair.outputs * pair.inputs];
    for (row, out) in out.chunks_exact_mut(pair.inputs).enumerate() {
        for (i, factor) in pair.b[row * pair.rank..][..pair.rank].iter().enumerate() {
            let a = &pair.a[i * pair.inputs..][..pair.inputs];
            out.iter_mut().zip(a).for_each(|(out, a)| *out += factor * a);
        }
        out.iter_mut().for_each(|out| *out *= pair.scaling as f32);
    }
    out
}

/// Tensors of one shape, pruned, weighted and summed.
fn summed(
    mut tensors: Vec<Vec<f32>>,
    weights: &[f64],
    rule: Rule,
    combination: &Combination,
    draw: &mut dyn FnMut(usize, usize, f64) -> Vec<bool>,
) -> Vec<f32> {
    let density = combination.density.unwrap_or(1.0);
    if density < 1.0 {
        for (at, tensor) in tensors.iter_mut().enumerate() {
            match rule.prune {
                None => {}
                Some(Prune::Magnitude) => prune(tensor, density),
                Some(Prune::Random) => {
                    let kept = draw(at, tensor.len(), density);
                    for (place, x) in tensor.iter_mut().enumerate() {
                        let kept = kept.get(place).copied().unwrap_or(false);
                        *x = if kept { *x / density as f32 } else { 0.0 };
                    }
                }
            }
        }
    }
    let sign = |x: f32| {
        if x > 0.0 {
            1.0
        } else if x < 0.0 {
            -1.0
        } else {
            0.0f32
        }
    };
    let len = tensors.first().map_or(0, Vec::len);
    (0..len)
        .map(|place| {
            let values = || tensors.iter().map(|tensor| tensor[place]);
            let weighted = values().zip(weights).map(|(x, weight)| x * *weight as f32);
            if !rule.elect {
                return weighted.sum();
            }
            let total: f32 = match combination.majority_sign_method {
                MajoritySign::Total => values().sum(),
                MajoritySign::Frequency => values().map(sign).sum(),
            };
            let majority = if total >= 0.0 { 1.0 } else { -1.0 };
            let (mut sum, mut count) = (0.0, 0.0f32);
            for (x, weighted) in values().zip(weighted) {
                if sign(x) == majority {
                    (sum, count) = (sum + weighted, count + 1.0);
                }
            }
            sum / count.max(1.0)
        })
        .collect()
}

/// Keeps the largest values.
fn prune(tensor: &mut [f32], density: f64) {
    let keep = (density * tensor.len() as f64) as usize;
    let mut order: Vec<usize> = (0..tensor.len()).collect();
    order.sort_by(|a, b| tensor[*b].abs().total_cmp(&tensor[*a].abs()));
    for place in order.into_iter().skip(keep) {
        tensor[place] = 0.0;
    }
}

/// The value below which that part of all lies, between two where it falls so.
fn quantile(mut values: Vec<f32>, part: f64) -> f32 {
    values.sort_by(f32::total_cmp);
    let place = part.clamp(0.0, 1.0) * values.len().saturating_sub(1) as f64;
    let (low, share) = (place.floor() as usize, place.fract() as f32);
    let at = |place: usize| values.get(place).copied().unwrap_or(0.0);
    if share == 0.0 {
        at(low)
    } else {
        at(low) + (at(low + 1) - at(low)) * share
    }
}

/// Modules and biases that only one of them has.
fn saved(adapters: &[&Adapter]) -> Result<BTreeMap<String, TensorView>> {
    let mut out = BTreeMap::new();
    for adapter in adapters {
        let whole = adapter
            .tensors()
            .iter()
            .filter(|(name, _)| !name.contains(".lora_"));
        for (name, tensor) in whole {
            let other = out.insert(name.clone(), tensor.clone());
            if other.is_some_and(|other| other.data != tensor.data) {
                return refuse(format!(
                    "several of the adapters bring `{name}`, which cannot be combined"
                ));
            }
        }
    }
    Ok(out)
}

pub(crate) fn view<const D: usize>(values: Vec<f32>, shape: [usize; D]) -> TensorView {
    let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    TensorView {
        dtype: DType::F32,
        shape: shape.to_vec(),
        data: bytes.into(),
    }
}
