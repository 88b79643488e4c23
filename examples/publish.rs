//! Publishes readings with QoS 1 over MQTT, each acknowledged once it is on disk.
//!
//! ```text
//! HEADGATE_API_KEY=hgk_... cargo run --example publish -- spindle/temp 21.5 21.7
//! ```
//!
//! The gateway is at `MQTT_ADDRESS`, by default `127.0.0.1:1883`. Any MQTT client works; what is particular
//! to Headgate is the key as user name, and that a PUBACK means that the reading is kept.

#![allow(clippy::print_stdout, reason = "this is what the program is for")]

use std::error::Error;
use std::time::Duration;

use rumqttc::{AsyncClient, Event, MqttOptions, Packet, QoS};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let topic = arguments.next().ok_or("usage: publish TOPIC PAYLOAD...")?;
    let readings: Vec<String> = arguments.collect();
    let gateway = std::env::var("MQTT_ADDRESS").unwrap_or_else(|_| "127.0.0.1:1883".to_owned());
    let (host, port) = gateway.rsplit_once(':').ok_or("MQTT_ADDRESS is HOST:PORT")?;

    let mut options = MqttOptions::new("example-publisher", host, port.parse()?);
    options.set_credentials(std::env::var("HEADGATE_API_KEY")?, "");
    options.set_keep_alive(Duration::from_secs(30));
    let (client, mut events) = AsyncClient::new(options, readings.len().max(1));
    for reading in &readings {
        client.publish(&topic, QoS::AtLeastOnce, false, reading.as_bytes()).await?;
    }

    // The client sends while its events are polled, and after a lost connection sends again what was not
    // acknowledged. An error here is final for a script like this one; a device would go on polling.
    let mut kept = 0;
    while kept < readings.len() {
        if let Event::Incoming(Packet::PubAck(_)) = events.poll().await? {
            kept += 1;
        }
    }
    println!("{kept} readings are kept");
    Ok(())
}
