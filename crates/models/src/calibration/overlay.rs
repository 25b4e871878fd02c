//! A checkpoint some of whose tensors have become others.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use oxiformers_hub::checkpoint::TensorView;
use oxiformers_nn::TensorSource;

/// A source that can be changed between two times that a model is loaded from it.
#[derive(Clone)]
pub struct Overlay {
    base: Arc<dyn TensorSource>,
    changes: Arc<RwLock<Changes>>,
}

/// What is different.
#[derive(Debug, Clone, Default)]
pub struct Changes {
    added: BTreeMap<String, TensorView>,
    removed: BTreeSet<String>,
}

impl Overlay {
    /// Everything as it is in `base`.
    pub fn new(base: Arc<dyn TensorSource>) -> Self {
        Self {
            base,
            changes: Arc::default(),
        }
    }

    /// Puts a tensor into the place of one of the same name, if there is one.
    pub fn set(&self, name: &str, view: TensorView) {
        let mut changes = self.changes.write().unwrap_or_else(PoisonError::into_inner);
        changes.removed.remove(name);
        changes.added.insert(name.to_string(), view);
    }

    /// Takes a tensor away.
    pub fn remove(&self, name: &str) {
        let mut changes = self.changes.write().unwrap_or_else(PoisonError::into_inner);
        changes.added.remove(name);
        changes.removed.insert(name.to_string());
    }

    /// What is different now.
    pub fn snapshot(&self) -> Changes {
        self.changes().clone()
    }

    /// Makes everything as it was.
    pub fn restore(&self, changes: Changes) {
        *self.changes.write().unwrap_or_else(PoisonError::into_inner) = changes;
    }

    fn changes(&self) -> RwLockReadGuard<'_, Changes> {
        self.changes.read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl TensorSource for Overlay {
    fn origin(&self) -> String {
        self.base.origin()
    }

    fn names(&self) -> Vec<String> {
        let changes = self.changes();
        let mut names = self.base.names();
        names.retain(|name| !changes.removed.contains(name) && !changes.added.contains_key(name));
        names.extend(changes.added.keys().cloned());
        names
    }

    fn contains(&self, name: &str) -> bool {
        let changes = self.changes();
        changes.added.contains_key(name) || !changes.removed.contains(name) && self.base.contains(name)
    }

    fn tensor(&self, name: &str) -> oxiformers_hub::Result<TensorView> {
        match self.changes().added.get(name) {
            Some(view) => Ok(view.clone()),
            None => self.base.tensor(name),
        }
    }

    fn rows_are_outputs(&self) -> bool {
        self.base.rows_are_outputs()
    }
}
