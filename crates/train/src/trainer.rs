//! The loop.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use burn::module::ParamId;
use burn::tensor::Tensor;
use oxiformers_data::tasks::{Draw, Row};
use oxiformers_data::{Dataset, Sampler, SamplingStrategy, batches};
use oxiformers_models::nn::parameters::{self, Kind, Values};
use oxiformers_models::nn::training::Pass;
use oxiformers_models::nn::{Parameter, Parameters, with_gradient_checkpointing};
use serde_json::{Map, Value, json};

use crate::arguments::{OnNan, Resume, Strategy};
use crate::buffer::{Buffer, like};
use crate::checkpoint::{self, Contents, Saver};
use crate::events::{Callback, Event, Plan};
use crate::optim::{self, Optimizer, Shapes, Step};
use crate::state::TrainerState;
use crate::task::{LossOptions, Network, Size, Task};
use crate::{Error, Result, Schedule, SchedulerType, TrainingArguments, clip, decay};

/// Examples that an error names.
const NAMED: usize = 8;

/// What is trained: a model on a device with autodiff, its parameters as loading found them, and how it is saved.
pub struct Trained<M> {
    /// The model.
    pub model: M,
    /// Its parameters.
    pub parameters: Arc<Parameters>,
    /// Writes it.
    pub saver: Box<dyn Saver>,
}

/// How a training ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// All steps are done.
    Finished,
    /// The metric got no better.
    StoppedEarly,
    /// It was asked to stop; a checkpoint was written.
    Interrupted,
}

/// What a training came to.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainOutput {
    /// How it ended.
    pub outcome: Outcome,
    /// Steps that are done.
    pub global_step: u64,
    /// The mean loss of the steps of this run.
    pub training_loss: f64,
}

/// Trains a model.
pub struct Trainer<T: Task> {
    arguments: TrainingArguments,
    task: T,
    /// Absent only while a step changes it.
    model: Option<T::Model>,
    parameters: Arc<Parameters>,
    trainable: Vec<Parameter>,
    ids: HashSet<ParamId>,
    saver: Box<dyn Saver>,
    train: Dataset,
    eval: Option<Dataset>,
    callbacks: Vec<Box<dyn Callback>>,
    stop: Arc<AtomicBool>,
    optimizer: Box<dyn Optimizer>,
    /// The values that learn, where the model's own are less precise or lie on another device.
    masters: Option<HashMap<ParamId, Buffer>>,
    state: TrainerState,
}

/// A batch, and what it is made of.
struct Taken<B> {
    batch: B,
    size: Size,
    sources: Vec<String>,
}

/// Why a step was not made.
enum Failure {
    /// A loss or a norm is no number.
    Nan {
        what: String,
        value: f64,
    },
    Error(Error),
}

impl<E: Into<Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Error(error.into())
    }
}

/// Numbers of a step.
struct Done {
    loss: f64,
    grad_norm: f64,
    tokens: u64,
    logs: Vec<(Cow<'static, str>, f64)>,
}

impl<T: Task> Trainer<T> {
    /// A training of `task` on the examples of `train`.
    ///
    /// # Errors
    /// Where arguments make no sense, or nothing is trained.
    pub fn new(
        arguments: TrainingArguments,
        task: T,
        trained: Trained<T::Model>,
        train: Dataset,
        eval: Option<Dataset>,
    ) -> Result<Self> {
        let trainable = trained.parameters.trainable();
        if trainable.is_empty() {
            return Err(Error::config("parameters", "hold nothing that is trained"));
        }
        if arguments.eval_strategy != Strategy::No && eval.as_ref().is_none_or(Dataset::is_empty) {
            return Err(Error::config("eval_strategy", "needs examples to evaluate"));
        }
        Ok(Self {
            optimizer: arguments.optimizer.build()?,
            ids: trainable.iter().map(|parameter| parameter.id).collect(),
            arguments,
            task,
            model: Some(trained.model),
            parameters: trained.parameters,
            trainable,
            saver: trained.saver,
            train,
            eval,
            callbacks: Vec::new(),
            stop: Arc::default(),
            masters: None,
            state: TrainerState::default(),
        })
    }

    /// Lets somebody watch.
    #[must_use]
    pub fn with_callback(mut self, callback: impl Callback + 'static) -> Self {
        self.callbacks.push(Box::new(callback));
        self
    }

    /// After the step during which this becomes true, a checkpoint is written, and the training stops.
    #[must_use]
    pub fn with_stop(mut self, stop: Arc<AtomicBool>) -> Self {
        self.stop = stop;
        self
    }

    /// Lets somebody watch.
    pub fn add_callback(&mut self, callback: Box<dyn Callback>) {
        self.callbacks.push(callback);
    }

    /// See [`with_stop`](Self::with_stop).
    pub fn set_stop(&mut self, stop: Arc<AtomicBool>) {
        self.stop = stop;
    }

    /// Seconds that a step takes, measured in two of them. They change the model: the training cannot be used after it.
    ///
    /// # Errors
    /// As [`train`](Self::train).
    pub fn measure_blocking(&mut self) -> Result<f64> {
        futures::executor::block_on(async {
            self.hold_masters().await?;
            let data = self.train.clone();
            let mut sampler = self.sampler(&data, 0);
            let mut seconds = 0.0;
            for step in 0..2 {
                let step = step % (self.plan().steps_per_epoch / self.task.steps_per_batch());
                let taken = self.take_batches(&data, &mut sampler, 0, step).await?;
                let began = Instant::now();
                match self.step(&taken, 0.0).await {
                    Ok(_) => seconds = began.elapsed().as_secs_f64(),
                    Err(Failure::Error(error)) => return Err(error),
                    Err(Failure::Nan { what, value }) => drop(self.diverged(what, value, &taken)?),
                }
            }
            Ok(seconds)
        })
    }

    /// Where the training is.
    pub fn state(&self) -> &TrainerState {
        &self.state
    }

    /// The arguments.
    pub fn arguments(&self) -> &TrainingArguments {
        &self.arguments
    }

    /// The model, as it is now.
    ///
    /// # Errors
    /// Where a step was torn in two by a panic.
    pub fn model(&self) -> Result<&T::Model> {
        self.model
            .as_ref()
            .ok_or_else(|| Error::Device("the model was lost in a step that failed".to_string()))
    }

    /// The model, for further use.
    ///
    /// # Errors
    /// As [`model`](Self::model).
    pub fn into_model(mut self) -> Result<T::Model> {
        self.model()?;
        self.model
            .take()
            .ok_or_else(|| Error::Device("the model was lost".to_string()))
    }

    /// What there is to do, from the step that a checkpoint has reached.
    pub fn plan(&self) -> Plan {
        let per_device = self.examples_per_batch(self.arguments.per_device_train_batch_size);
        let all = batches(self.train.len(), per_device, self.arguments.dataloader_drop_last);
        let steps_per_epoch = all
            .div_ceil(self.arguments.gradient_accumulation_steps as u64)
            .max(1)
            * self.task.steps_per_batch();
        let max_steps = match self.arguments.max_steps {
            steps @ 1.. => steps as u64,
            _ => (self.arguments.num_train_epochs * steps_per_epoch as f64).ceil() as u64,
        };
        let (trainable_parameters, all_parameters) = self.parameters.count();
        Plan {
            examples: self.train.len(),
            eval_examples: self.eval.as_ref().map_or(0, Dataset::len),
            steps_per_epoch,
            max_steps,
            first_step: self.state.global_step,
            trainable_parameters,
            all_parameters,
        }
    }

    /// [`train`](Self::train) for callers that wait.
    ///
    /// # Errors
    /// As [`train`](Self::train).
    pub fn train_blocking(&mut self) -> Result<TrainOutput> {
        futures::executor::block_on(self.train())
    }

    /// [`evaluate`](Self::evaluate) for callers that wait.
    ///
    /// # Errors
    /// As [`evaluate`](Self::evaluate).
    pub fn evaluate_blocking(&mut self) -> Result<Map<String, Value>> {
        futures::executor::block_on(self.evaluate())
    }

    /// Trains until all steps are done, the metric gets no better, or it is asked to stop.
    ///
    /// # Errors
    /// [`Error::Diverged`] where the loss is no number and that is to stop; a file that cannot be read or written; a
    /// batch that does not fit the model. The last checkpoint is then as it was.
    pub async fn train(&mut self) -> Result<TrainOutput> {
        let output = self.arguments.output_dir.clone();
        std::fs::create_dir_all(&output).map_err(Error::io(&output))?;
        checkpoint::clean(&output)?;
        self.hold_masters().await?;
        self.resume()?;
        let plan = self.plan();
        if self.train.is_empty()
            || batches(
                self.train.len(),
                self.examples_per_batch(self.arguments.per_device_train_batch_size),
                self.arguments.dataloader_drop_last,
            ) == 0
        {
            return Err(Error::config(
                "train",
                "holds no examples, or less than a batch (dataloader_drop_last)",
            ));
        }
        self.state.max_steps = plan.max_steps;
        let mut schedule = self.schedule(plan.max_steps)?;
        self.emit(&Event::Begin(&plan))?;
        let (begun, mut total_loss) = (Instant::now(), 0.0);
        if self.arguments.eval_on_start && self.state.global_step == 0 {
            self.evaluate_and_judge(&mut schedule).await?;
        }
        let data = self.train.clone();
        let mut sampler: Option<(u64, Sampler)> = None;
        let (mut taken, repeats) = (Vec::new(), self.task.steps_per_batch());
        let mut outcome = Outcome::Finished;
        while self.state.global_step < plan.max_steps {
            let step = self.state.global_step;
            let (epoch, within) = (step / plan.steps_per_epoch, step % plan.steps_per_epoch);
            if sampler.as_ref().is_none_or(|(of, _)| *of != epoch) {
                sampler = Some((epoch, self.sampler(&data, epoch)));
            }
            let Some((_, sampler)) = &mut sampler else { break };
            let began = Instant::now();
            if within % repeats == 0 || taken.is_empty() {
                taken = self.take_batches(&data, sampler, epoch, within / repeats).await?;
            }
            let learning_rate = schedule.learning_rate(step as usize);
            let done = match self.step(&taken, learning_rate).await {
                Ok(done) => done,
                Err(Failure::Error(error)) => return Err(error),
                Err(Failure::Nan { what, value }) => self.diverged(what, value, &taken)?,
            };
            self.state.global_step += 1;
            if let Some(model) = &self.model {
                self.task
                    .after_step(model, &self.trainable, self.state.global_step);
            }
            self.state.epoch = self.state.global_step as f64 / plan.steps_per_epoch as f64;
            self.state.num_input_tokens_seen += done.tokens;
            self.state.loss_since_log = written(self.state.loss_since_log + done.loss);
            self.state.steps_since_log += 1;
            for (name, value) in &done.logs {
                add_log(&mut self.state.logs_since_log, name, *value);
            }
            total_loss += done.loss;
            self.emit(&Event::Step {
                loss: done.loss,
                grad_norm: done.grad_norm,
                learning_rate,
                tokens: done.tokens,
                took: began.elapsed(),
            })?;
            let last = self.state.global_step == plan.max_steps;
            let ends_epoch = within + 1 == plan.steps_per_epoch || last;
            let first = self.arguments.logging_first_step && self.state.global_step == 1;
            let (strategy, every) = (self.arguments.logging_strategy, self.arguments.logging_steps);
            if self.is_due(strategy, every, ends_epoch, 1) || first {
                self.log_steps(&done, learning_rate)?;
            }
            // What is not at its end cannot be gone on with: the batches are known to nobody else.
            let complete = (within + 1).is_multiple_of(repeats) || last;
            let eval_steps = self.arguments.eval_steps.unwrap_or(self.arguments.logging_steps);
            let so_far = match self.arguments.eval_strategy {
                Strategy::Epoch => self.state.epoch,
                _ => self.state.global_step as f64,
            };
            let (mut is_best, mut is_over) = (false, false);
            if complete
                && self.is_due(self.arguments.eval_strategy, eval_steps, ends_epoch, repeats)
                && so_far >= self.arguments.eval_delay
            {
                (is_best, is_over) = self.evaluate_and_judge(&mut schedule).await?;
            }
            let strategy = self.arguments.save_strategy;
            let mut saves = complete && self.is_due(strategy, self.arguments.save_steps, ends_epoch, repeats);
            saves |= (last && strategy == Strategy::Steps) || (is_best && strategy == Strategy::Best);
            let interrupted = self.stop.load(Ordering::SeqCst) && complete && !last;
            if saves || interrupted {
                self.save_checkpoint(&schedule).await?;
            }
            if interrupted {
                outcome = Outcome::Interrupted;
                break;
            }
            if is_over && !last {
                outcome = Outcome::StoppedEarly;
                break;
            }
        }
        let steps = self.state.global_step - plan.first_step;
        let training_loss = total_loss / steps.max(1) as f64;
        if outcome != Outcome::Interrupted {
            self.load_best()?;
            let seconds = begun.elapsed().as_secs_f64();
            let mut log = Map::new();
            log.insert("train_loss".to_string(), json!(training_loss));
            log.insert("train_runtime".to_string(), json!(seconds));
            log.insert(
                "train_steps_per_second".to_string(),
                json!(steps as f64 / seconds.max(1e-9)),
            );
            self.log(log)?;
        }
        let finished = outcome == Outcome::Finished;
        self.emit(&Event::End { finished })?;
        Ok(TrainOutput {
            outcome,
            global_step: self.state.global_step,
            training_loss,
        })
    }

    /// Writes the model as it is now.
    ///
    /// # Errors
    /// Where the folder cannot be written to.
    pub async fn save_model(&self, folder: &Path) -> Result<()> {
        let buffers = self.buffers().await?;
        let values = |parameter: &Parameter| buffers.get(&parameter.id).map(Buffer::values);
        self.saver.save(folder, &self.parameters, &values)
    }

    /// [`save_model`](Self::save_model) for callers that wait.
    ///
    /// # Errors
    /// As [`save_model`](Self::save_model).
    pub fn save_model_blocking(&self, folder: &Path) -> Result<()> {
        futures::executor::block_on(self.save_model(folder))
    }

    /// Loss and metrics over the examples for evaluation, by the names `eval_loss` and so on.
    ///
    /// # Errors
    /// Where there are none, or a batch does not fit the model.
    pub async fn evaluate(&mut self) -> Result<Map<String, Value>> {
        let Some(data) = self.eval.clone() else {
            return Err(Error::config("eval", "holds no examples"));
        };
        let began = Instant::now();
        let model = self.model()?.without_autodiff();
        let batch_size = self.examples_per_batch(self.arguments.per_device_eval_batch_size);
        let all = batches(data.len(), batch_size, false);
        let mut sampler = Sampler::new(&data, batch_size, false, SamplingStrategy::Sequential, 0, 0);
        let draw = Draw {
            seed: self.arguments.seed,
            epoch: 0,
        };
        let mut metrics = self.task.metrics();
        let options = LossOptions {
            label_smoothing: 0.0,
            answers: true,
        };
        let (mut sum, mut items) = (0.0, 0);
        let mut logged = BTreeMap::new();
        for number in 0..all {
            let rows = rows(&data, sampler.batch(number)?)?;
            let batch = self.task.collate(&model, &rows, draw).await?;
            let size = self.task.size(&batch);
            let outputs = self.task.loss(&model, &batch, options)?;
            if let Some(loss) = outputs.loss {
                sum += read(loss).await? * size.items as f64;
                items += size.items;
            }
            for (name, value) in outputs.logs {
                add_log(&mut logged, &name, read(value).await?);
            }
            metrics.add(&outputs.logits.read().await?, &batch);
            self.emit(&Event::Evaluating {
                done: number + 1,
                all,
            })?;
            if self.stop.load(Ordering::SeqCst) && self.state.max_steps == 0 {
                break;
            }
        }
        let loss = sum / items.max(1) as f64;
        let mut log = Map::new();
        log.insert("eval_loss".to_string(), json!(loss));
        if let Some((name, value)) = self.task.of_loss(loss) {
            log.insert(format!("eval_{name}"), json!(value));
        }
        for (name, value) in metrics.finish() {
            log.insert(format!("eval_{name}"), json!(value));
        }
        for (name, (sum, count)) in logged {
            log.insert(format!("eval_{name}"), json!(sum / count as f64));
        }
        let seconds = began.elapsed().as_secs_f64();
        log.insert("eval_runtime".to_string(), json!(seconds));
        log.insert(
            "eval_samples_per_second".to_string(),
            json!(data.len() as f64 / seconds.max(1e-9)),
        );
        Ok(log)
    }

    /// The schedule, as a checkpoint has it or anew.
    fn schedule(&self, max_steps: u64) -> Result<Schedule> {
        if let Some(schedule) = &self.state.schedule {
            return Ok(schedule.clone());
        }
        let mut config = self.arguments.schedule.clone();
        let warmup = self.arguments.warmup_steps;
        config.warmup_steps = match warmup < 1.0 {
            true => (max_steps as f64 * warmup).ceil() as usize,
            false => warmup as usize,
        };
        Schedule::new(&config, self.arguments.learning_rate, max_steps as usize)
    }

    fn sampler<'a>(&self, data: &'a Dataset, epoch: u64) -> Sampler<'a> {
        let arguments = &self.arguments;
        Sampler::new(
            data,
            self.examples_per_batch(arguments.per_device_train_batch_size),
            arguments.dataloader_drop_last,
            arguments.train_sampling_strategy,
            arguments.data_seed.unwrap_or(arguments.seed),
            epoch,
        )
    }

    /// The examples of a batch with so many rows.
    fn examples_per_batch(&self, rows: usize) -> usize {
        (rows / self.task.rows_per_example()).max(1)
    }

    /// The batches of a step.
    async fn take_batches(
        &self,
        data: &Dataset,
        sampler: &mut Sampler<'_>,
        epoch: u64,
        step: u64,
    ) -> Result<Vec<Taken<T::Batch>>> {
        let per_step = self.arguments.gradient_accumulation_steps as u64;
        let draw = Draw {
            seed: self.arguments.data_seed.unwrap_or(self.arguments.seed),
            epoch,
        };
        let mut taken = Vec::new();
        for number in step * per_step..(step + 1) * per_step {
            let indices = sampler.batch(number)?;
            if indices.is_empty() {
                break;
            }
            let rows = rows(data, indices)?;
            let batch = self.task.collate(self.model()?, &rows, draw).await?;
            taken.push(Taken {
                size: self.task.size(&batch),
                sources: rows
                    .iter()
                    .map(|row| data.source(row.index, &row.example))
                    .collect(),
                batch,
            });
        }
        Ok(taken)
    }

    /// One step: the gradients of all batches, clipped, and what the optimizer makes of them.
    async fn step(&mut self, taken: &[Taken<T::Batch>], learning_rate: f64) -> Result<Done, Failure> {
        let items: u64 = taken.iter().map(|taken| taken.size.items).sum();
        let mut done = Done {
            loss: 0.0,
            grad_norm: 0.0,
            tokens: taken.iter().map(|taken| taken.size.tokens).sum(),
            logs: Vec::new(),
        };
        let options = LossOptions {
            label_smoothing: self.arguments.label_smoothing_factor,
            answers: false,
        };
        let mut grads: HashMap<ParamId, Buffer> = HashMap::new();
        for (index, Taken { batch, size, .. }) in taken.iter().enumerate() {
            let pass = self.pass(index as u64);
            let model = self.model()?;
            let forward = || pass.run(|| self.task.loss(model, batch, options));
            let outputs = match self.arguments.gradient_checkpointing {
                true => with_gradient_checkpointing(forward),
                false => forward(),
            }?;
            for (name, value) in outputs.logs {
                done.logs.push((name, read(value).await?));
            }
            let Some(loss) = outputs.loss else { continue };
            let share = size.items as f64 / items.max(1) as f64;
            let loss = if share == 1.0 { loss } else { loss * share };
            let value = read(loss.clone()).await?;
            if !value.is_finite() {
                let what = "the loss".to_string();
                return Err(Failure::Nan { what, value });
            }
            done.loss += value;
            if !loss.is_tracked() {
                return Err(Error::config(
                    "parameters",
                    "are not what the loss depends on; load the model on a device with autodiff",
                )
                .into());
            }
            let gradients = loss.backward();
            drop(loss);
            let (model, values, new) = parameters::take(self.take_model()?, &self.ids, Some(gradients));
            self.model = Some(parameters::put(model, &self.trainable, &values, true));
            drop(values);
            for (id, grad) in new {
                let grad = Buffer::new(grad).await?;
                match grads.get_mut(&id) {
                    Some(sum) => sum
                        .values_mut()
                        .iter_mut()
                        .zip(grad.values())
                        .for_each(|(sum, grad)| *sum += grad),
                    None => drop(grads.insert(id, grad)),
                }
            }
        }
        let in_order = || {
            self.trainable
                .iter()
                .filter_map(|parameter| grads.get(&parameter.id))
        };
        done.grad_norm = clip::norm(in_order().map(Buffer::values));
        if !done.grad_norm.is_finite() {
            let what = self.not_finite(&grads);
            return Err(Failure::Nan {
                what,
                value: done.grad_norm,
            });
        }
        self.update(&grads, learning_rate, done.grad_norm).await?;
        Ok(done)
    }

    /// The first gradient that is no number, in words.
    fn not_finite(&self, grads: &HashMap<ParamId, Buffer>) -> String {
        let bad = |parameter: &&Parameter| {
            let grad = grads.get(&parameter.id);
            grad.is_some_and(|grad| grad.values().iter().any(|value| !value.is_finite()))
        };
        match self.trainable.iter().find(bad) {
            Some(parameter) => format!("the gradient of `{}`", parameter.name),
            None => "the norm of the gradients".to_string(),
        }
    }

    fn take_model(&mut self) -> Result<T::Model> {
        self.model()?;
        self.model
            .take()
            .ok_or_else(|| Error::Device("the model was lost".to_string()))
    }

    /// Changes the values by their gradients.
    async fn update(&mut self, grads: &HashMap<ParamId, Buffer>, lr: f64, norm: f64) -> Result<()> {
        let most = self.arguments.max_grad_norm;
        let grad_scale = if most > 0.0 {
            clip::clip_coefficient(norm, most) as f32
        } else {
            1.0
        };
        let step = Step { lr, grad_scale };
        let (model, mut values, _) = parameters::take(self.take_model()?, &self.ids, None);
        for parameter in &self.trainable {
            // What took no part in the loss stays as it is.
            let Some(grad) = grads.get(&parameter.id) else {
                continue;
            };
            let Some(tensor) = values.remove(&parameter.id) else {
                continue;
            };
            let of = optim::Parameter {
                name: &parameter.name,
                shape: &parameter.shape,
                decays: parameter.kind != Kind::LayerNorm && decay::decays(&parameter.name),
                embedding: parameter.kind == Kind::Embedding,
            };
            let changed = match self
                .masters
                .as_mut()
                .and_then(|masters| masters.get_mut(&parameter.id))
            {
                Some(master) => {
                    self.optimizer
                        .update(of, master.values_mut(), grad.values(), step);
                    like(&tensor, master.values())
                }
                None => {
                    let mut own = Buffer::new(tensor).await?;
                    self.optimizer.update(of, own.values_mut(), grad.values(), step);
                    own.into_tensor()
                }
            };
            values.insert(parameter.id, changed);
        }
        self.model = Some(parameters::put(model, &self.trainable, &values, true));
        Ok(())
    }

    /// Dropout and noise of a batch: the same for the same step, whatever was before.
    fn pass(&self, batch: u64) -> Pass {
        let mut seed = self.arguments.seed ^ 0x5851_f42d_4c95_7f2d;
        for number in [self.state.global_step, batch] {
            seed = (seed ^ number)
                .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                .rotate_left(29);
        }
        Pass {
            seed,
            neftune_noise_alpha: self.arguments.neftune_noise_alpha.unwrap_or(0.0),
            ..self.task.pass()
        }
    }

    /// What is done where the loss is no number: the error, or a step that was left out.
    fn diverged(&mut self, what: String, value: f64, taken: &[Taken<T::Batch>]) -> Result<Done> {
        let sources = taken.iter().flat_map(|taken| &taken.sources);
        let mut examples: Vec<String> = sources.clone().take(NAMED).cloned().collect();
        let more = sources.count().saturating_sub(NAMED);
        if more > 0 {
            examples.push(format!("and {more} more"));
        }
        let step = self.state.global_step + 1;
        let error = Error::Diverged {
            step,
            what,
            value,
            examples,
        };
        if self.arguments.on_nan == OnNan::Stop {
            return Err(error);
        }
        tracing::warn!("left out: {error}");
        self.state.skipped_steps += 1;
        self.emit(&Event::Skipped(&error.to_string()))?;
        // Its loss would spoil the mean.
        let mean = self.state.loss_since_log / self.state.steps_since_log.max(1) as f64;
        Ok(Done {
            loss: mean,
            grad_norm: 0.0,
            tokens: 0,
            logs: Vec::new(),
        })
    }

    /// Whether something is to be done after one of the last steps.
    fn is_due(&self, strategy: Strategy, every: f64, ends_epoch: bool, steps: u64) -> bool {
        match strategy {
            Strategy::No | Strategy::Best => false,
            Strategy::Epoch => ends_epoch,
            Strategy::Steps => {
                let every = self.arguments.steps_of(every, self.state.max_steps).max(1);
                self.state.global_step % every < steps.min(every)
            }
        }
    }

    fn log_steps(&mut self, done: &Done, learning_rate: f64) -> Result<()> {
        let mut log = Map::new();
        let mean = self.state.loss_since_log / self.state.steps_since_log.max(1) as f64;
        log.insert("loss".to_string(), json!(mean));
        log.insert("grad_norm".to_string(), json!(done.grad_norm));
        log.insert("learning_rate".to_string(), json!(learning_rate));
        for (name, (sum, count)) in std::mem::take(&mut self.state.logs_since_log) {
            log.insert(name, json!(sum / count as f64));
        }
        (self.state.loss_since_log, self.state.steps_since_log) = (0.0, 0);
        self.log(log)
    }

    /// Adds a log to the history, with the step and the epoch, and tells everybody.
    fn log(&mut self, mut log: Map<String, Value>) -> Result<()> {
        for value in log.values_mut() {
            if let Some(number) = value.as_f64().filter(|_| value.is_f64()) {
                *value = json!(written(number));
            }
        }
        log.insert("epoch".to_string(), json!(self.state.epoch));
        log.insert("step".to_string(), json!(self.state.global_step));
        self.state.log_history.push(log.clone());
        self.emit(&Event::Log(&log))
    }

    fn emit(&mut self, event: &Event) -> Result<()> {
        for callback in &mut self.callbacks {
            callback.on_event(event, &self.state, &self.arguments)?;
        }
        Ok(())
    }

    /// Evaluates; returns whether the metric is the best so far, and whether it is time to stop.
    async fn evaluate_and_judge(&mut self, schedule: &mut Schedule) -> Result<(bool, bool)> {
        let log = self.evaluate().await?;
        let name = self.arguments.best_metric();
        let metric = log.get(&name).and_then(Value::as_f64).map(written);
        let known: Vec<String> = log.keys().cloned().collect();
        self.log(log)?;
        let chooses = self.arguments.load_best_model_at_end
            || self.arguments.early_stopping_patience.is_some()
            || self.arguments.save_strategy == Strategy::Best
            || self.arguments.metric_for_best_model.is_some()
            || schedule.observes();
        if !chooses {
            return Ok((false, false));
        }
        let metric = metric.ok_or_else(|| {
            Error::config(
                "metric_for_best_model",
                format!("is `{name}`; evaluation gives {}", known.join(", ")),
            )
        })?;
        schedule.observe(metric);
        let better = |than: f64, by: f64| match self.arguments.greater_is_better() {
            true => metric > than + by,
            false => metric < than - by,
        };
        let best = self.state.best_metric;
        let patient = best.is_none_or(|best| better(best, self.arguments.early_stopping_threshold));
        let is_best = best.is_none_or(|best| better(best, 0.0));
        self.state.patience_counter = if patient {
            0
        } else {
            self.state.patience_counter + 1
        };
        if is_best {
            self.state.best_metric = Some(metric);
            self.state.best_global_step = Some(self.state.global_step);
        }
        let patience = self.arguments.early_stopping_patience;
        let is_over = patience.is_some_and(|patience| self.state.patience_counter >= patience.max(1));
        Ok((is_best, is_over))
    }

    /// Whether values are changed where they are, or copies of them.
    async fn hold_masters(&mut self) -> Result<()> {
        let values = parameters::values(self.model()?, &self.ids);
        if values.len() != self.trainable.len() {
            let missing = self
                .trainable
                .iter()
                .find(|parameter| !values.contains_key(&parameter.id));
            let name = missing.map_or("", |parameter| parameter.name.as_str());
            return Err(Error::config(
                "parameters",
                format!("name `{name}`, which the model does not have"),
            ));
        }
        let in_place = |tensor: &Tensor<1>| {
            let device = burn::tensor::Device::flex();
            tensor.device() == device && tensor.dtype() == burn::tensor::DType::F32
        };
        if self.masters.is_none() && !values.values().all(in_place) {
            let mut masters = HashMap::new();
            for (id, tensor) in values {
                masters.insert(id, Buffer::new(tensor).await?);
            }
            self.masters = Some(masters);
        }
        Ok(())
    }

    /// The values as they are now.
    async fn buffers(&self) -> Result<HashMap<ParamId, Buffer>> {
        if let Some(masters) = &self.masters {
            return Ok(masters.clone());
        }
        let mut buffers = HashMap::new();
        for (id, tensor) in parameters::values(self.model()?, &self.ids) {
            buffers.insert(id, Buffer::new(tensor).await?);
        }
        Ok(buffers)
    }

    /// Gives the parameters other values.
    fn set_values(&mut self, mut new: HashMap<String, Vec<f32>>) -> Result<()> {
        let (model, old, _) = parameters::take(self.take_model()?, &self.ids, None);
        let mut values = Values::new();
        for parameter in &self.trainable {
            let (Some(tensor), Some(new)) = (old.get(&parameter.id), new.remove(&parameter.name)) else {
                continue;
            };
            values.insert(parameter.id, like(tensor, &new));
            if let Some(masters) = &mut self.masters {
                masters.insert(parameter.id, Buffer::from_vec(new));
            }
        }
        drop(old);
        self.model = Some(parameters::put(model, &self.trainable, &values, true));
        Ok(())
    }

    /// What the order of examples, and so the curve, depends on.
    fn order(&self) -> Value {
        let arguments = &self.arguments;
        let mut order = json!({
            "per_device_train_batch_size": arguments.per_device_train_batch_size,
            "gradient_accumulation_steps": arguments.gradient_accumulation_steps,
            "dataloader_drop_last": arguments.dataloader_drop_last,
            "train_sampling_strategy": arguments.train_sampling_strategy,
            "seed": arguments.seed,
            "data_seed": arguments.data_seed,
        });
        let (rows, steps) = (self.task.rows_per_example(), self.task.steps_per_batch());
        if (rows, steps) != (1, 1) {
            order["num_generations"] = json!(rows);
            order["num_iterations"] = json!(steps);
        }
        order
    }

    async fn save_checkpoint(&mut self, schedule: &Schedule) -> Result<()> {
        let output = self.arguments.output_dir.clone();
        self.state.data = self.train.fingerprint();
        self.state.order = self.order();
        self.state.schedule = schedule.observes().then(|| schedule.clone());
        if self.state.best_global_step == Some(self.state.global_step) {
            self.state.best_model_checkpoint =
                Some(PathBuf::from(checkpoint::folder_name(self.state.global_step)));
        }
        let buffers = self.buffers().await?;
        let contents = Contents {
            state: &self.state,
            arguments: &Value::Object(self.arguments.to_json()),
            optimizer: self.optimizer.state(),
            task: self.task.state(&self.trainable).await?,
        };
        let values = |parameter: &Parameter| buffers.get(&parameter.id).map(Buffer::values);
        let path = checkpoint::write(&output, &contents, self.saver.as_ref(), &self.parameters, &values)?;
        drop(buffers);
        checkpoint::rotate(
            &output,
            self.arguments.save_total_limit,
            self.state.best_model_checkpoint.as_deref(),
        )?;
        self.emit(&Event::Saved(&path))
    }

    /// Goes on from a checkpoint, if so told.
    fn resume(&mut self) -> Result<()> {
        let output = &self.arguments.output_dir;
        let folder = match &self.arguments.resume_from_checkpoint {
            None | Some(Resume::Last(false)) => return Ok(()),
            Some(Resume::Last(true)) => match checkpoint::list(output)?.pop() {
                Some((_, path)) => path,
                None => return Ok(()),
            },
            Some(Resume::At(path)) => path.clone(),
        };
        let loaded = checkpoint::read(&folder, self.saver.as_ref(), &self.parameters)?;
        let data = self.train.fingerprint();
        if loaded.state.data != data {
            return Err(Error::checkpoint(
                &folder,
                "was written by a training on other data (or with another tokenizer, length or split); its curve cannot be \
                 continued",
            ));
        }
        let order = self.order();
        let fields = order.as_object().into_iter().flatten();
        if let Some((name, value)) = fields
            .into_iter()
            .find(|(name, value)| loaded.state.order.get(name.as_str()) != Some(value))
        {
            let before = loaded.state.order.get(name).unwrap_or(&Value::Null);
            let message = format!(
                "was written with `{name}` = {before}, and now it is {value}; its curve cannot be continued"
            );
            return Err(Error::checkpoint(&folder, message));
        }
        let shapes: Shapes = (self.trainable.iter())
            .map(|parameter| (parameter.name.clone(), parameter.shape.clone()))
            .collect();
        self.optimizer.load_state(&loaded.optimizer, &shapes)?;
        self.task.load_state(loaded.task, &self.trainable)?;
        self.set_values(loaded.values)?;
        self.state = loaded.state;
        Ok(())
    }

    /// Makes the best model the one that is there, if so told.
    fn load_best(&mut self) -> Result<()> {
        let Some(best) = self
            .state
            .best_model_checkpoint
            .clone()
            .filter(|_| self.arguments.load_best_model_at_end)
        else {
            return Ok(());
        };
        let folder = self.arguments.output_dir.join(best);
        let values = checkpoint::read_values(&folder, self.saver.as_ref(), &self.parameters)?;
        self.set_values(values)
    }

    /// Whether the schedule moves with a metric, which then has to be evaluated.
    pub fn needs_evaluation(&self) -> bool {
        matches!(
            self.arguments.schedule.lr_scheduler_type,
            SchedulerType::ReduceLrOnPlateau | SchedulerType::Greedy
        )
    }
}

/// A number with as many digits as are read back from a file as they were written: 15.
fn written(number: f64) -> f64 {
    format!("{number:.14e}").parse().unwrap_or(number)
}

/// Examples by their numbers.
fn rows(data: &Dataset, indices: Vec<u64>) -> Result<Vec<Row>> {
    let one = |index| {
        Ok(Row {
            index,
            example: data.get(index)?,
        })
    };
    indices.into_iter().map(one).collect()
}

/// The number that a tensor holds.
async fn read(tensor: Tensor<1>) -> Result<f64> {
    let data = tensor.inner().into_data_async().await;
    let data = data.map_err(|error| Error::Device(format!("{error:?}")))?;
    Ok(data.iter::<f64>().next().unwrap_or(f64::NAN))
}

/// Adds a number to what will be logged as a mean; not all batches have every one.
fn add_log(logs: &mut BTreeMap<String, (f64, u64)>, name: &str, value: f64) {
    let (sum, count) = logs.entry(name.to_string()).or_default();
    *sum = written(*sum + value);
    *count += 1;
}
