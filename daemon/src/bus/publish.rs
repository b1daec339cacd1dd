//! One object on a connection, and one signal for all that changed.

use std::borrow::Cow;
use std::collections::HashMap;

use zbus::Connection;
use zbus::fdo::Properties;
use zbus::object_server::{Interface, SignalEmitter};
use zbus::wire::{ObjectPath, OwnedVariant, Variant};

/// Properties that change all the time by themselves: computed when they are read, never signalled.
const NEVER_SIGNALLED: [&str; 1] = ["LagUSec"];

type Values = HashMap<String, OwnedVariant>;

/// An object that is served, and what was last told of it.
pub(super) struct Published<I> {
    emitter: SignalEmitter<'static>,
    object: I,
    told: Values,
}

impl<I: Interface + Clone> Published<I> {
    /// Serves an object at a path.
    pub(super) async fn add(connection: &Connection, path: &str, object: I) -> zbus::Result<Self> {
        let path = ObjectPath::try_from(path)?.into_owned();
        let emitter = SignalEmitter::from_parts(connection.clone(), path.clone());
        let mut published = Self { emitter, object: object.clone(), told: Values::new() };
        // Taken before the object is told to anybody, so that no change in between is lost.
        published.told = published.values().await?;
        connection.object_server().at(path, object).await?;
        Ok(published)
    }

    /// What is served.
    pub(super) fn object(&self) -> &I {
        &self.object
    }

    /// Tells what changed since the last time, if anything did.
    pub(super) async fn signal_changes(&mut self) -> zbus::Result<()> {
        let values = self.values().await?;
        let changed = changed(&self.told, &values);
        if !changed.is_empty() {
            Properties::properties_changed(&self.emitter, I::name(), changed, Cow::Borrowed(&[])).await?;
        }
        self.told = values;
        Ok(())
    }

    /// Ends serving it.
    pub(super) async fn remove(self) -> zbus::Result<()> {
        let server = self.emitter.connection().object_server();
        server.remove::<I, _>(self.emitter.path()).await.map(|_| ())
    }

    async fn values(&self) -> zbus::Result<Values> {
        let connection = self.emitter.connection();
        Ok(self.object.get_all(connection.object_server(), connection, None, &self.emitter).await?)
    }
}

fn changed<'a>(before: &Values, after: &'a Values) -> HashMap<&'a str, Variant<'a>> {
    let signalled = after.iter().filter(|(name, _)| !NEVER_SIGNALLED.contains(&name.as_str()));
    let differ = signalled.filter(|(name, value)| before.get(*name) != Some(*value));
    differ.filter_map(|(name, value)| Some((name.as_str(), Variant::try_from(value).ok()?))).collect()
}
